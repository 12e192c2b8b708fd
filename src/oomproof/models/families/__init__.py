"""The families of models whose tensors we can name, as data.

A new family needs one entry in dense.py or mixture.py, next to its like:
  - `architecture` and `model_type` as transformers names them;
  - `attention`, `mlp`, `experts`, `norms`: the parts of a layer in the order in which transformers'
    modelling file creates them (that is the order of the state dict), in the words of parts.py;
  - `slides`: which layers have a sliding window where the file has no layer_types;
  - `defaults`: what transformers' config class fills in for fields that published files leave out;
and one small config in tests/models/configs.py, which is compared with transformers' own model,
name by name and shape by shape. A decoder that the words of parts.py cannot say needs a new word
there, never a branch on the family's name.
"""
