"""train.py and evaluate.py with fake CUDA tensors, on a machine without a GPU: every case of a file in turn.

    LD_PRELOAD=.../libdevice_count.so LD_LIBRARY_PATH=... python tests/fake_cuda/run.py CASES.json     # as test_fake_cuda.py does

A fake tensor has shape, dtype and device but no content; operations on it are not computed, yet raise as on a GPU when another
operand is on the CPU. Tensors on the CPU stay real, and what is copied there from the device is made up.

CASES.json: {name: [script, argv]}. Leaves CASES.out.json: {name: {
    "error": the traceback, or null,
    "synchronisations": {place: number of times the CPU waited for the device, or copied to it},
    "dtypes": {place: {operation: the "device dtype" of its floating outputs}},
}}. A place is the innermost function of the project at work, as "sampler.py:gaussian"; in a backward pass there is none: "?".
"""

import ctypes
import json
import os
import shutil
import sys
import traceback
from collections import Counter, defaultdict
from pathlib import Path

import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = {str(path): str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *ROOT.glob("[!t]*/*.py")]}  # without tests/
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
GENERATOR = torch.Generator().manual_seed(0)
aten = torch.ops.aten


def place() -> str:
    """The innermost function of the project at work in this thread."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename in PROJECT:
            return f"{PROJECT[frame.f_code.co_filename]}:{frame.f_code.co_qualname.split('.<locals>')[0]}"
        frame = frame.f_back
    return "?"


def made_up(fake: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor on the CPU like a fake one, whose content is finite and positive."""
    if fake.is_floating_point():
        return torch.rand(fake.shape, generator=GENERATOR).add(0.05).to(dtype or fake.dtype)
    return torch.ones(fake.shape, dtype=dtype or fake.dtype)


def on_device(tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


class FakeCuda(TorchDispatchMode):
    """While it is on, tensors on CUDA devices are fake; it counts synchronisations and notes dtypes."""

    def __init__(self):
        super().__init__()
        self.synchronisations = Counter()
        self.dtypes = defaultdict(lambda: defaultdict(set))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = torch.device(kwargs["device"]).type if kwargs.get("device") else None
        if target != "cuda" and FakeTensor not in types:
            return operation(*args, **kwargs)
        if operation is torch.ops.prim.device.default:
            return args[0].fake_device
        if self.synchronises(operation, args, target):
            self.synchronisations[place()] += 1
        if operation is aten._to_copy.default and target == "cpu":
            return made_up(args[0], kwargs.get("dtype"))
        if operation is aten.copy_.default and not on_device(args[0]):
            return args[0].copy_(made_up(args[1]))
        if operation is aten._local_scalar_dense.default:
            return made_up(args[0]).item()
        with FAKE:
            result = operation(*args, **kwargs)
        noted = self.dtypes[place()][operation.overloadpacket.__name__]
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not on_device(
                leaf
            ):  # as when a tensor on the CPU is indexed by one that is not
                raise RuntimeError(f"{operation} of tensors on the CPU and on the device")
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                noted.add(f"{leaf.fake_device.type} {str(leaf.dtype).removeprefix('torch.')}")
        return result

    def synchronises(self, operation, args, target: str | None) -> bool:
        """Whether it copies from pageable CPU memory to the device, or waits for what comes back."""
        match operation.overloadpacket:
            case aten._to_copy:
                return target is not None and on_device(args[0]) != (target == "cuda")
            case aten.copy_:
                return on_device(args[1]) > on_device(args[0]) or (on_device(args[0]) > on_device(args[1]) and args[1].dim() > 0)
            case aten.index | aten.index_put | aten.index_put_:
                return any(not on_device(index) or index.dtype == torch.bool for index in args[1] if index is not None)
            case aten._local_scalar_dense | aten.nonzero | aten.masked_select | aten.equal:
                return True
        return False


def install() -> None:
    """Makes this torch believe in its GPU as far as forward, autocast and backward go."""
    torch.cuda._lazy_init = lambda: None
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # or autocast turns itself off
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.empty_cache = torch.cuda.reset_peak_memory_stats = lambda: None  # no memory is taken, and all of it is free
    torch.cuda.max_memory_reserved, torch.cuda.mem_get_info = lambda: 0, lambda: (1, 1)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") begins as a real tensor on the CPU
    with FAKE:
        torch.empty(1, device="cuda")  # puts in a device guard that does nothing

    # The autograd engine asks of dozens of devices whether they are in use, and what it asks about has to exist.
    library, engine = ctypes.CDLL(os.environ["LD_PRELOAD"]), torch.autograd.graph._engine_run_backward

    def run_backward(*args, **kwargs):
        library.set_device_count(100)
        try:
            return engine(*args, **kwargs)
        finally:
            library.set_device_count(0)

    torch.autograd.graph._engine_run_backward = torch.autograd._engine_run_backward = run_backward

    # Attention asks the GPU which kernel to take; without an answer it would be made of matrix products in fp32.
    usual = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        if not on_device(query):
            return usual(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        fused = aten._scaled_dot_product_efficient_attention
        return fused(query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale)[0]

    torch.nn.functional.scaled_dot_product_attention = attention

    def apply(module, function, recurse=True):
        """Module._apply with new parameters: the usual one gives the old ones new content, which cannot be of another device."""
        for part in module.modules():
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else function(buffer)
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    with torch.no_grad():
                        part._parameters[name] = torch.nn.Parameter(function(parameter), parameter.requires_grad)
        return module

    torch.nn.Module._apply = apply

    # What is written to disk needs content.
    FakeTensor.__reduce_ex__ = lambda self, protocol: made_up(self).__reduce_ex__(protocol)
    save_file = safetensors.torch.save_file
    safetensors.torch.save_file = lambda tensors, *args, **kwargs: save_file(
        {n: t.cpu() for n, t in tensors.items()}, *args, **kwargs
    )
    UNet2DConditionModel.save_pretrained = lambda unet, folder: shutil.copytree(unet.config._name_or_path, folder)


def main(file: Path) -> None:
    install()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import evaluate
    import train
    from plumbing import processes

    processes.start = lambda *args, **kwargs: torch.device("cuda", 0)
    scripts, outcomes = {"train": train.main, "evaluate": evaluate.main}, {}
    for name, (script, argv) in json.loads(file.read_text()).items():
        error = None
        with FakeCuda() as device:
            try:
                scripts[script](argv)
            except BaseException:  # SystemExit is how the scripts report what they expect to go wrong
                error = traceback.format_exc()
        dtypes = {
            place: {operation: sorted(noted) for operation, noted in found.items()} for place, found in device.dtypes.items()
        }
        outcomes[name] = {"error": error, "synchronisations": device.synchronisations, "dtypes": dtypes}
    file.with_suffix(".out.json").write_text(json.dumps(outcomes, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
