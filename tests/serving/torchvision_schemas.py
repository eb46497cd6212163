"""Lets torchvision's Python code be imported beside a PyTorch that its compiled code was not built for.

torchvision describes two of its compiled operators on import and fails where they do not exist. `install_vllm.py`
copies this file beside torchvision and has torchvision import it first, so that it works in every process.
"""

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")  # operators are gone when it is

for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
