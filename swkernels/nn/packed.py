"""What modules of a packed matrix share: their buffers, state dicts and checks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from swkernels.backends.plan import CODES, SCALE_DTYPES, ZERO_POINTS, plan_of
from swkernels.errors import InvalidInput, NoDenseWeight
from swkernels.ops.block_dequantize import check_packed
from swkernels.ops.quantized import OUTLIER_DTYPES, SCALE_BLOCK, QuantizedTensor

_PREFIX = "packed_"
_PLAN, _CHECKSUM = "packed_plan", "packed_checksum"
_VERSION = 1  # of the meaning of the buffers
_CHECKSUM_BYTES = 8
# A cast of the model (``.to(bfloat16)``, ``.half()``) rounds floating-point buffers: integers of
# the same size hold their bits. Outliers are bytes: how many each has, their plan says, so that
# a merge may widen them.
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_OUTLIER_DTYPE = 7  # the place in ``packed_plan``


class PackedModule(nn.Module):
    """A module that holds one packed matrix in buffers, and no weight.

    The buffers are ``packed_codes``, ``packed_scales`` and so on, after the tensors of
    ``QuantizedTensor``; ``packed_plan``, which says what they mean; and ``packed_checksum``. All
    are integers. Write to none of them: ``set_packed`` is the way.
    """

    def set_packed(self, q: QuantizedTensor) -> None:
        """Hold another packed matrix of the same shape; it may have more outliers, or others.

        Raises:
            InvalidInput: ``q`` is no packed matrix, or of another shape; nothing is changed.
        """
        check_packed(q)
        form = self.__dict__.get("_form")
        if form is not None and form.shape != q.shape:
            raise InvalidInput(
                f"expected a packed matrix {list(form.shape)}, got {list(q.shape)}: make a new "
                f"{type(self).__name__} of it"
            )
        for key in self._keys():
            del self._buffers[key]
        for name, tensor in q.tensors().items():
            bits = tensor.detach().view(_stored_dtype(name, tensor.dtype))
            self.register_buffer(_PREFIX + name, bits)
        plan = torch.tensor(_describe(q), dtype=torch.int32, device=q.device)
        self.register_buffer(_PLAN, plan)
        checksum = torch.zeros(_CHECKSUM_BYTES, dtype=torch.uint8, device=q.device)
        self.register_buffer(_CHECKSUM, checksum)
        self._form = q.to("meta")
        self._sealed = q.codes.is_meta  # whether the checksum is one: a file will bring it
        self._viewed: tuple | None = None  # see ``packed``

    @property
    def packed(self) -> QuantizedTensor:
        """The packed matrix; it shares the memory of the buffers."""
        if torch.compiler.is_compiling():
            return self._view()
        # A move or a load puts other tensors in the place of the buffers. Those that were seen
        # are kept, so that no other tensor has their identity.
        key = tuple(map(id, self._buffers.values()))
        if self._viewed is None or self._viewed[0] != key:
            self._viewed = key, self._view(), tuple(self._buffers.values())
        return self._viewed[1]

    @property
    def weight(self) -> PackedWeight:
        """What stands where a dense layer has its weight."""
        return PackedWeight(self._form.shape, self._form.dtype, self.packed_codes.device)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The matrix in ``dtype``; by default in that of the weight it was made of."""
        return self.packed.dequantize(dtype)

    def verify(self, name: str | None = None) -> None:
        """Check shapes, types, ranges and the checksum of all that is packed.

        Args:
            name: of the module, for the message.

        Raises:
            InvalidInput: a buffer is not what it must be; the message names it.
        """
        if not self._sealed:
            self._seal()
        self._form = _check(self._stored(), self._form, name or type(self).__name__)
        self._viewed = None

    def form_repr(self) -> str:
        """What ``repr`` says of the packed matrix."""
        plan, (r, c) = self._form.plan, self._form.plan.block
        kind = "" if plan.code.symmetric else " asymmetric"
        block = f"{c}" if r == 0 else f"{r} x {c}"
        kept = len(self.packed_positions)
        return f"{plan.code.name}{kind}, block={block}, scales={plan.scale_dtype}, kept={kept}"

    def _view(self) -> QuantizedTensor:
        held = self._form.tensors()
        return self._form.with_tensors(
            {n: _reinterpret(self._buffers[_PREFIX + n], t.dtype) for n, t in held.items()}
        )

    def _keys(self) -> list[str]:
        return [key for key in self._buffers if key.startswith(_PREFIX)]

    def _stored(self) -> dict[str, torch.Tensor]:
        return {key: self._buffers[key] for key in self._keys()}

    def _seal(self) -> None:
        self.packed_checksum.copy_(_checksum(self._stored()))
        self._sealed = True

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if not self._sealed:
            self._seal()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        keys = self._keys()
        stored = {key: state_dict[prefix + key] for key in keys if prefix + key in state_dict}
        if len(stored) == len(keys):  # PyTorch reports what is missing
            module = prefix.removesuffix(".") or type(self).__name__
            self._form = _check(stored, self._form, module)
            self._viewed = None
            for key in ("packed_positions", "packed_values"):
                held = self._buffers[key]
                if held.shape != stored[key].shape:
                    self._buffers[key] = held.new_empty(stored[key].shape)
            self._sealed = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_viewed": None}


@dataclass(frozen=True)
class PackedWeight:
    """What stands where a dense layer has its weight: its form, without values.

    Libraries look at the device and the type of a layer's weight before they put something beside
    it. Whatever else they ask for, such as ``data`` to merge something into, is refused.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad = False
    _is_hf_initialized = True  # or transformers would draw values for it

    def __getattr__(self, name: str):
        raise NoDenseWeight(
            f"a packed layer has no dense weight, so no {name!r} of it: read its values with "
            "dequantize(), merge adapters into the model that was quantized"
        )


def empty_packed(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    outliers: int,
    code: str = "int4",
    symmetric: bool = True,
    block_size: int | tuple[int, int] | str = 64,
    scale_dtype: str = "float32",
    outlier_dtype: torch.dtype | None = None,
    device: torch.device | str = "meta",
) -> QuantizedTensor:
    """A packed matrix without values, in the form that ``block_quantize`` gives a weight.

    Args:
        shape: of the weight.
        dtype: of the weight.
        outliers: how many values are kept exactly.
        code, symmetric, block_size, scale_dtype, outlier_dtype: as in ``block_quantize``.
        device: where it is made.

    Raises:
        InvalidInput: as ``block_quantize``.
    """
    plan = plan_of(
        shape, code=code, symmetric=symmetric, block_size=block_size, clip=None,
        scale_dtype=scale_dtype,
    )  # fmt: skip

    def empty(count, kind):
        return torch.empty(count, dtype=kind, device=device)

    if scale_dtype == "int8":
        scales = empty_packed(
            (plan.blocks,), dtype=torch.float32, outliers=0, code="int8", symmetric=False,
            block_size=SCALE_BLOCK, device=device,
        )  # fmt: skip
    else:
        scales = empty(plan.blocks, SCALE_DTYPES[scale_dtype])
    zero_points = None if symmetric else empty(plan.blocks, ZERO_POINTS[scale_dtype][0])
    return QuantizedTensor(
        tuple(shape), dtype, plan, empty(plan.code_bytes, torch.uint8), scales, zero_points,
        empty(outliers, torch.int32), empty(outliers, outlier_dtype or dtype),
    )  # fmt: skip


def _describe(q: QuantizedTensor) -> list[int]:
    """What ``packed_plan`` holds; all else of a plan follows."""
    code = q.plan.code
    return [
        _VERSION, *q.plan.block, CODES.index(code.name), int(code.symmetric),
        list(SCALE_DTYPES).index(q.plan.scale_dtype), OUTLIER_DTYPES.index(q.dtype),
        OUTLIER_DTYPES.index(q.values.dtype), *q.shape,
    ]  # fmt: skip


def _checksum(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    digest = hashlib.blake2b(digest_size=_CHECKSUM_BYTES)
    for key in sorted(stored):
        if key != _CHECKSUM:
            data = stored[key].detach().cpu().contiguous().numpy()
            digest.update(f"{key} {data.nbytes} ".encode())
            digest.update(data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of the buffer of a tensor of ``QuantizedTensor``."""
    return torch.uint8 if name == "values" else _BITS.get(dtype, dtype)


def _reinterpret(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See the bits of a buffer as ``dtype``; bytes from a file may lie anywhere."""
    if stored.dtype == torch.uint8 and not torch.compiler.is_compiling():
        if (stored.data_ptr() | stored.storage_offset()) % dtype.itemsize:
            stored = stored.clone()
    return stored.view(dtype)


def _check(
    stored: dict[str, torch.Tensor], form: QuantizedTensor, module: str
) -> QuantizedTensor:
    """Return the form of what is stored: ``form``, with the outliers' own type.

    Raises:
        InvalidInput: it is no packed matrix of that form, or not that of its checksum.
    """

    def refuse(key: str, what: str):
        raise InvalidInput(
            f"{key} of {module} {what}: the file is damaged or not of this model; get it anew"
        )

    def check_form(key: str, dtype: torch.dtype, shape) -> None:
        tensor = stored[key]
        if tensor.dtype != dtype or tensor.shape != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            refuse(key, f"is {found}, expected {dtype} {list(shape)}")

    described = _describe(form)
    check_form(_PLAN, torch.int32, torch.Size([len(described)]))
    check_form(_CHECKSUM, torch.uint8, torch.Size([_CHECKSUM_BYTES]))
    told = stored[_PLAN].tolist()
    if told[_OUTLIER_DTYPE] in range(len(OUTLIER_DTYPES)):
        described[_OUTLIER_DTYPE] = told[_OUTLIER_DTYPE]
    if told != described:
        refuse(_PLAN, f"is {told}, expected {described}")
    outlier_dtype = OUTLIER_DTYPES[told[_OUTLIER_DTYPE]]
    form = replace(form, values=torch.empty(0, dtype=outlier_dtype, device="meta"))
    kept = stored["packed_positions"].numel()  # how many, the file says
    for name, tensor in form.tensors().items():
        shape = tensor.shape
        if name in ("positions", "values"):
            shape = torch.Size([kept * (outlier_dtype.itemsize if name == "values" else 1)])
        check_form(_PREFIX + name, _stored_dtype(name, tensor.dtype), shape)
    _check_values(stored, form, refuse)
    if not torch.equal(_checksum(stored), stored[_CHECKSUM].cpu()):
        refuse(_CHECKSUM, "is not that of the buffers")
    return form


def _check_values(stored, form: QuantizedTensor, refuse: Callable[[str, str], None]) -> None:
    for name, tensor in form.tensors().items():
        key, values = _PREFIX + name, _reinterpret(stored[_PREFIX + name], tensor.dtype)
        if name.endswith("scales") and not bool((values >= 0).all()):
            refuse(key, "holds a scale that is negative or not a number")
        if values.is_floating_point() and not bool(values.isfinite().all()):
            refuse(key, "holds NaN or infinity")
    for key, exponent in _zero_points(form):
        if len(stored[key]) and int(stored[key].long().abs().max()) > 2**exponent:
            refuse(key, f"holds a zero point beyond 2^{exponent}")
    positions = stored["packed_positions"].long()
    if len(positions) and not (0 <= int(positions[0]) and int(positions[-1]) < form.plan.elements):
        refuse("packed_positions", f"has one outside of the {form.plan.elements} elements")
    if not bool((positions[1:] > positions[:-1]).all()):
        refuse("packed_positions", "is not ascending")


def _zero_points(form: QuantizedTensor):
    """The names of zero points, and the exponents that bound them."""
    if form.zero_points is not None:
        yield "packed_zero_points", ZERO_POINTS[form.plan.scale_dtype][1]
    if isinstance(form.scales, QuantizedTensor):
        yield "packed_scales_zero_points", ZERO_POINTS["float32"][1]
