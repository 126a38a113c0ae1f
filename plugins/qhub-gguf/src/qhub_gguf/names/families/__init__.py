"""Tables of names, one file per kinship of architectures.

Source of every name: gguf-py's constants.py and tensor_mapping.py; of every recipe: ``modify_tensors`` of the model's
class in convert_hf_to_gguf (llama.cpp, conversion/). The tests compare both.
"""
