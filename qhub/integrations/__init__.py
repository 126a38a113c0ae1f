"""The only code that knows a host's internals, one host a file or folder: transformers, PEFT, the Hub."""
