"""GGUF for qhub: reads, keeps packed, trains and writes the files of llama.cpp."""
