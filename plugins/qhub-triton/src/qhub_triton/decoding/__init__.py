"""The small operations of a decode step, each one kernel: contracts and references in qhub.decoding.operations."""
