"""What knows a host's internals, one host a file or folder: transformers, PEFT, the Hub. The rest of qhub knows
none."""
