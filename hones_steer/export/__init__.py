"""Profiles written for other software.

`peft` writes IA3 adapters, `lora` LoRA adapters (`adapters` has what the two share), and `merged` complete checkpoints,
from those that `checkpoint` reads. `sidecar` and `cards` write the files that lie beside each. The way back, from an
adapter to a profile, is `hones_steer.importing`.
"""
