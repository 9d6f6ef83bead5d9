"""Vectors of 16 numbers inside Numba code, so that the machine code does not depend on LLVM's loop vectorizer.

LLVM cannot prove that a kernel's many buffers do not overlap, and leaves such loops scalar. Here the kernel says what
goes into a register: :func:`load`, :func:`broadcast` and :func:`zeros` make vectors, ``+ - * /`` between vectors, or
between a vector and a number, work on all lanes, ``a * b + c`` may be fused, and float32 meets float64 in float64. LLVM
splits a vector where registers are narrower (AVX2, NEON).

Everything here is for compiled code only. Indices count entries of a flat array and are not checked: a wrong one reads
or writes foreign memory. Numba's cache of compiled code watches the file of the cached function only: after a change
here, touch :mod:`ntk_lightning.kernels.infinite.fused_cpu_numba`.
"""

# ruff: noqa: ANN401 - the objects of Numba and LLVM have no types
from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it has no types
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, overload, register_model

__all__ = [
    "LANES",
    "above",
    "absolute",
    "broadcast",
    "copysign",
    "exp",
    "load",
    "polynomial",
    "positive",
    "root",
    "sqrt",
    "store",
    "zeros",
]

LANES = 16
_AVX512 = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2]


class _Vector(types.Type):
    """16 lanes of one floating-point type."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: _Vector) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.dtype).get_value_type(), LANES))  # type: ignore[no-untyped-call]  # Numba's


def _splat(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    single = builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
    return _shuffle(builder, single, single, [0] * LANES)


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _vector_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    vector = context.get_value_type(_Vector(array_type.dtype))
    return builder.bitcast(_pointer(context, builder, array_type, array, index), vector.as_pointer())


def _load(typing_context: Any, array: Any, index: Any) -> Any:
    """Vector of array[index : index + 16]; any alignment."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        align = signature.return_type.dtype.bitwidth // 8
        return builder.load(_vector_pointer(context, builder, array, *values), align=align)

    return _Vector(array.dtype)(array, types.intp), emit


def _broadcast(typing_context: Any, array: Any, index: Any) -> Any:
    """Vector with array[index] in every lane."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _splat(builder, builder.load(_pointer(context, builder, array, *values)))

    return _Vector(array.dtype)(array, types.intp), emit


def _zeros(typing_context: Any, array: Any) -> Any:
    """Vector of zeros of the array's type."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return _Vector(array.dtype)(array), emit


def _store(typing_context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write the vector to array[index : index + 16]; any alignment."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _vector_pointer(context, builder, array, *values[:2])
        builder.store(values[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), emit


def _widen(context: Any, builder: Any, value: Any, kind: Any, wide: _Vector) -> Any:
    """A number in every lane of the wide type, or a vector of it."""
    if not isinstance(kind, _Vector):
        return _splat(builder, context.cast(builder, value, kind, wide.dtype))
    return value if kind == wide else builder.fpext(value, context.get_value_type(wide))


def _elementwise(emit: Callable[..., Any], arity: int) -> Any:
    """Compiled function of vectors and numbers, at least one a vector, that ``emit(builder, *vectors)`` writes."""

    def typed(*arguments: Any) -> Any:
        vectors = [a for a in arguments if isinstance(a, _Vector)]
        if not vectors:
            return None
        wide = max(vectors, key=lambda vector: vector.dtype.bitwidth)

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pairs = zip(values, signature.args, strict=True)
            return emit(builder, *(_widen(context, builder, value, kind, wide) for value, kind in pairs))

        return wide(*arguments), code

    if arity == 1:
        return intrinsic(lambda typing_context, a: typed(a))
    if arity == 2:
        return intrinsic(lambda typing_context, a, b: typed(a, b))
    return intrinsic(lambda typing_context, a, b, c: typed(a, b, c))


def polynomial(single: Sequence[float], double: Sequence[float]) -> Any:
    """Make a compiled polynomial of a vector.

    Args:
        single: Coefficients for float32, the constant first.
        double: Coefficients for float64.

    Returns:
        A function for compiled code, from a vector to a vector.

    Example:
        >>> import numba, numpy
        >>> square = polynomial([0.0, 0.0, 1.0], [0.0, 0.0, 1.0])
        >>> a = numpy.arange(16.0)
        >>> numba.njit(lambda a: store(a, 0, square(load(a, 0))))(a)
        >>> a[:4].tolist()
        [0.0, 1.0, 4.0, 9.0]
    """

    def emit(builder: Any, x: Any) -> Any:
        # In memory, not in the code: from there they go right into the sums, with one address for all of them.
        coefficients = double if _bits(x.type) == 64 else single
        kind = ir.ArrayType(x.type.element, len(coefficients))
        name = f"polynomial.{hashlib.blake2b(repr((kind, coefficients)).encode(), digest_size=8).hexdigest()}"
        table = builder.module.globals.get(name)
        if table is None:
            table = ir.GlobalVariable(builder.module, kind, name)
            table.linkage, table.initializer = "linkonce_odr", ir.Constant(kind, [float(c) for c in coefficients])
        zero = ir.Constant(ir.IntType(32), 0)
        constants = [
            _splat(builder, builder.load(builder.gep(table, [zero, ir.Constant(ir.IntType(32), i)], inbounds=True)))
            for i in range(len(coefficients))
        ]
        total = constants.pop()
        while constants:
            total = builder.fadd(builder.fmul(total, x, flags=["contract"]), constants.pop(), flags=["contract"])
        return total

    return _elementwise(emit, 1)


def _bits(vector_type: Any) -> int:
    return 64 if isinstance(vector_type.element, ir.DoubleType) else 32


def _operator(symbol: Callable[..., Any], emit: Callable[..., Any]) -> None:
    function = _elementwise(emit, 2)

    overload(symbol)(
        lambda a, b: (lambda a, b: function(a, b)) if isinstance(a, _Vector) or isinstance(b, _Vector) else None
    )


def _llvm(name: str, arity: int) -> Any:
    """The function ``llvm.NAME`` of vectors."""
    return _elementwise(lambda builder, *vectors: _call(builder, name, *vectors), arity)


def _call(builder: Any, name: str, *vectors: Any) -> Any:
    kind = vectors[0].type
    symbol = f"llvm.{name}.v{LANES}f{_bits(kind)}"
    function = builder.module.globals.get(symbol) or ir.Function(
        builder.module, ir.FunctionType(kind, [kind] * len(vectors)), symbol
    )
    return builder.call(function, vectors)


_operator(operator.add, lambda builder, a, b: builder.fadd(a, b, flags=["contract"]))
_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b, flags=["contract"]))
_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b, flags=["contract"]))
_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))

sqrt = _llvm("sqrt", 1)
absolute = _llvm("fabs", 1)
copysign = _llvm("copysign", 2)

above = _elementwise(lambda builder, a, bound, other: builder.select(builder.fcmp_ordered(">", a, bound), a, other), 3)
"""above(a, bound, other): a where a > bound, else other."""

positive = _elementwise(
    lambda builder, a, b, c: builder.select(builder.fcmp_ordered(">", a, ir.Constant(a.type, [0.0] * LANES)), b, c), 3
)
"""positive(a, b, c): b where a > 0, else c."""


def _root(builder: Any, x: Any, bound: Any) -> Any:
    """With AVX-512 in float32, s = x / sqrt(x) is estimated and a Newton step, s + s (1 - s / sqrt(x)) / 2, made."""
    zero = ir.Constant(x.type, [0.0] * LANES)
    above_bound = builder.fcmp_ordered(">", x, bound)
    if _bits(x.type) == 64 or not _AVX512:
        return _call(builder, "sqrt", builder.select(above_bound, x, zero))
    kind, mask = x.type, ir.IntType(16)
    symbol = "llvm.x86.avx512.rsqrt14.ps.512"
    function = builder.module.globals.get(symbol) or ir.Function(
        builder.module, ir.FunctionType(kind, [kind, kind, mask]), symbol
    )
    inverse = builder.call(function, [x, zero, mask(0xFFFF)])
    half = ir.Constant(kind, [0.5] * LANES)
    estimate = builder.fmul(x, inverse)
    error = builder.fsub(
        half, builder.fmul(estimate, builder.fmul(half, inverse), flags=["contract"]), flags=["contract"]
    )
    root = builder.fadd(estimate, builder.fmul(estimate, error, flags=["contract"]), flags=["contract"])
    return builder.select(above_bound, root, zero)


root = _elementwise(_root, 2)
"""root(a, bound): sqrt(a) where a > bound >= 0, else 0."""


def _exp(builder: Any, x: Any) -> Any:
    """2^n exp(x - n log 2), with n the whole number nearest to x / log 2; 2^n in two factors, for tiny results."""
    wide = _bits(x.type) == 64
    mantissa, bias, lowest, highest = (52, 1023, -746.0, 710.0) if wide else (23, 127, -104.0, 89.0)
    whole = ir.VectorType(ir.IntType(64 if wide else 32), LANES)

    def constant(value: float) -> Any:
        return ir.Constant(x.type, [value] * LANES)

    def integer(value: int) -> Any:
        return ir.Constant(whole, [value] * LANES)

    def power(exponent: Any) -> Any:
        return builder.bitcast(builder.shl(builder.add(exponent, integer(bias)), integer(mantissa)), x.type)

    inside = builder.select(builder.fcmp_ordered(">", x, constant(lowest)), x, constant(lowest))
    inside = builder.select(builder.fcmp_ordered("<", inside, constant(highest)), inside, constant(highest))
    n = _call(builder, "rint", builder.fmul(inside, constant(1 / math.log(2))))
    high = 0.693359375  # log 2 in 10 bits, so that n times it is exact, and what is left of log 2
    rest = builder.fsub(inside, builder.fmul(n, constant(high)), flags=["contract"])
    rest = builder.fsub(rest, builder.fmul(n, constant(-2.12194440054690582768e-4)), flags=["contract"])
    total = constant(0.0)
    for power_of_rest in range(13 if wide else 7, -1, -1):
        term = constant(1 / math.factorial(power_of_rest))
        total = builder.fadd(builder.fmul(total, rest, flags=["contract"]), term, flags=["contract"])
    exponent = builder.fptosi(n, whole)
    half = builder.ashr(exponent, integer(1))
    value = builder.fmul(builder.fmul(total, power(half)), power(builder.sub(exponent, half)))
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


exp = _elementwise(_exp, 1)
"""exp(a), to a few units in the last place; infinity above what the type holds."""

load: Any = intrinsic(_load)
broadcast: Any = intrinsic(_broadcast)
zeros: Any = intrinsic(_zeros)
store: Any = intrinsic(_store)
