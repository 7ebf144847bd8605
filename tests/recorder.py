"""A stand-in for CUDA graphs on the CPU: what a function launches, recorded by its addresses and launched again."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalora.rescale import replay


class Recorder(TorchDispatchMode):
    """Records operations, and takes back what they change at the end: while a graph is captured, nothing runs.

    Numbers of the host are recorded as they are, and no tensor may be read by the host, as in a CUDA graph.
    """

    def __init__(self):
        super().__init__()
        self.launched = []
        self.before = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        written = [
            a for a, of in zip(args, func._schema.arguments, strict=False) if of.alias_info and of.alias_info.is_write
        ]
        self.before += [(tensor, tensor.clone()) for tensor in tree_leaves(written)]
        out = func(*args, **kwargs)
        self.launched.append((func, args, kwargs, out))
        return out

    def take_back(self):
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def launch(self):
        for func, args, kwargs, out in self.launched:
            if func.is_view:
                continue
            for recorded, now in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(now, torch.Tensor) and now is not recorded:
                    recorded.copy_(now)


class Recordings:
    """How often something has been recorded, and launched again; and the last recording, as long as it is kept."""

    def __init__(self, monkeypatch):
        self.recorded = self.launched = 0
        for user in ("scalora.rescaling", "scalora.pair_adamw"):
            monkeypatch.setattr(f"{user}.is_recordable", lambda devices: True)
        monkeypatch.setattr(replay, "record", self._record)

    def _record(self, function, device, memory):
        recorder = Recorder()
        try:
            with recorder:
                output = function()
        finally:
            recorder.take_back()
        self.recorded += 1

        def launch():
            self.launched += 1
            recorder.launch()

        self.kept = weakref.ref(launch)
        return launch, output
