"""A network without optimiser whose weights are cut over the ranks."""

import torch
from torch import nn

from mstkd.engine.backend.library import deepspeed


class ShardedNetwork:
    """Cuts a frozen network's weights over the ranks, in place: ZeRO-3 without optimiser.

    Hooks gather each layer's weights before it runs and drop them after it, so the module is called as before, but by
    all ranks, equally often. `in_host_memory`: each rank's part lies there and comes to the device layer by layer.
    Tensors of up to 100,000 elements stay whole once they have been gathered (DeepSpeed's default).
    """

    def __init__(self, network: nn.Module, device: torch.device, in_host_memory: bool):
        """Collective. The network holds its whole weights, in host memory: they go to the device one by one."""
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 3},
        }
        if in_host_memory:
            settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
        library = deepspeed()
        library.zero.Init(module=network, config_dict_or_path=settings)  # before `initialize`, which would move it to the device whole
        self._engine, *_ = library.initialize(model=network, config=settings)
        for buffer in network.buffers():
            buffer.data = buffer.data.to(device)
        for module in network.modules():  # a weight that another module reads is gathered then, too: DeepSpeed does so inside its engine only
            module._parameters._in_forward = True
        network.eval()

    def destroy(self) -> None:
        self._engine.destroy()
