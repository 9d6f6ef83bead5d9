r"""The Triton kernel of :mod:`ntk_lightning.kernels.infinite.fused_cuda`: one level of one block of pairs.

A lane is one (pair, dy, dx) with x' = x + dx and y' = y + dy (mod W, H). It walks down y with a chunk of the newest row
in registers; rows are tuples of tensors, and a tensor holds one column in all lanes of a program. With h[y] the filter
over x, the filter over y is

    out[y - 1] = s[y - 1] + keep h[y],   s[y] = h[y] + keep h[y - 1],   keep = 0 where y or y' is 0, else 1,

so each convolution keeps s and h of one row and lags one row; after the last row the walk goes round to the first ones.
"""

# ruff: noqa: ANN001, ANN201, ANN202, RUF005 - Triton compiles a subset of Python in which types are not written down
# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

_ARCCOS = tl.constexpr(  # arccos(a) / sqrt(1 - a) on [0, 1] to 2e-8, highest power first
    (
        *(-0.0012943975161761045, 0.006788052152842283, -0.017262041568756104, 0.03102188929915428),
        *(-0.05022600665688515, 0.08898942172527313, -0.21459971368312836, 1.5707963267948966),
    )
)
_ARCCOS_DOUBLE = tl.constexpr(  # to 2e-12
    (
        *(8.370320263805873e-05, -0.0006440717794519807, 0.0023363405579416695, -0.00543430347156163),
        *(0.009433357976546245, -0.013691464924659792, 0.018304556062840475, -0.024296108886088182),
        *(0.03367037510622571, -0.05079189407253996, 0.0890485816918372, -0.21460183588226064, 1.570796326792771),
    )
)
_ARCCOS_SLOPE = tl.constexpr(  # (arccos(a) / sqrt(1 - a) - pi / 2) / a on [0, 1] to 2e-8
    (
        *(0.0009364871056050106, -0.004957686192362587, 0.012578687615310002, -0.021991731497068123),
        *(0.03313650323782591, -0.05072887276779321, 0.08904567440855382, -0.21460181371733314),
    )
)


@triton.jit
def _arcsin_root(r, NAMES: tl.constexpr, S: tl.constexpr):
    """Compute arcsin(r) and sqrt(1 - r^2), with arccos(a) = sqrt(1 - a) * polynomial."""
    ARCCOS: tl.constexpr = _ARCCOS if r.dtype == tl.float32 else _ARCCOS_DOUBLE
    SLOPE: tl.constexpr = _ARCCOS_SLOPE if r.dtype == tl.float32 else _ARCCOS_DOUBLE
    NOISE: tl.constexpr = 4e-7 if r.dtype == tl.float32 else 1e-15
    a = tl.abs(r)
    if NAMES[S] == "relu":
        gap = tl.where(a < 1 - NOISE, 1 - a, 0.0)  # the square root would blow up the rounding of r = 1
        polynomial = ARCCOS[0]
        for n in tl.static_range(1, 8 if r.dtype == tl.float32 else 13):
            polynomial = ARCCOS[n] + a * polynomial
        arcsin = 1.5707963267948966 - tl.sqrt(gap) * polynomial
        arcsin = tl.where(r < 0, -arcsin, arcsin)
    else:
        gap = tl.maximum(1 - a, NOISE)  # divided by; this small by rounding only
        slope = SLOPE[0]
        for n in tl.static_range(1, 8 if r.dtype == tl.float32 else 12):
            slope = SLOPE[n] + a * slope
        root = tl.sqrt(gap)
        arcsin = r * (1.5707963267948966 / (1 + root) - root * slope)  # to relative precision, for dark images
    return arcsin, tl.sqrt(gap * (1 + a))


@triton.jit
def _dual_activation(k, a, inverse1, inverse2, NAMES: tl.constexpr, SLOPES: tl.constexpr, S: tl.constexpr):
    """Compute E[phi(u) phi(v)] and E[phi'(u) phi'(v)]: reference.dual_activation given the tables of ``_tables``."""
    inverse = inverse1 * inverse2
    arcsin, root = _arcsin_root(k * inverse, NAMES, S)
    if NAMES[S] == "relu":
        even: tl.constexpr = (1 - SLOPES[S]) * (1 - SLOPES[S]) / 4 * 0.6366197723675814
        odd: tl.constexpr = (1 + SLOPES[S]) * (1 + SLOPES[S]) / 4
        nngp = odd * k + even * (a * root + k * arcsin)
        derivative = odd + even * arcsin
    elif NAMES[S] == "erf":
        nngp = arcsin * 0.6366197723675814
        derivative = inverse / root * 0.6366197723675814
    else:
        tl.static_assert(NAMES[S] == "gelu", "no such activation")
        orthant = 0.25 + arcsin * 0.15915494309189535
        density = inverse / root * 0.15915494309189535
        tilt = k * (inverse1 * inverse1 + inverse2 * inverse2)
        nngp = density * (a + k * (tilt - k)) + k * orthant
        derivative = orthant + density * (tilt + k * (inverse / root) * (inverse / root))
    return nngp, derivative


@triton.jit
def _box(row, sums, previous, links, keep, FIRST_LINK: tl.constexpr):
    """Take in a row and give the 3x3 sums of the one before it, two columns narrower, and the new state."""
    out, new_sums, new_previous = (), (), ()
    for k in tl.static_range(len(row) - 2):
        h = row[k + 1] + links[FIRST_LINK + k] * row[k] + links[FIRST_LINK + k + 1] * row[k + 2]
        out = out + (sums[k] + keep * h,)
        new_sums = new_sums + (h + keep * previous[k],)
        new_previous = new_previous + (h,)
    return out, new_sums, new_previous


@triton.jit
def _constant_row(value, WIDTH: tl.constexpr):
    """Repeat one tensor."""
    row = ()
    for _ in tl.static_range(WIDTH):
        row = row + (value,)
    return row


@triton.jit
def _image_row(image1, image2, CHANNELS: tl.constexpr, PLANE: tl.constexpr, WIDTH: tl.constexpr):
    """Mean over channels of the products of two rows of pixels."""
    row = ()
    for k in tl.static_range(WIDTH):
        total = tl.load(image1 + k) * tl.load(image2 + k)
        for channel in tl.static_range(1, CHANNELS):
            total += tl.load(image1 + channel * PLANE + k) * tl.load(image2 + channel * PLANE + k)
        row = row + (total * (1.0 / CHANNELS),)
    return row


@triton.jit
def _pooled_row(below, dy, y, start, H, W, STRIDE, DY_COUNT, STEPS, WIDTH: tl.constexpr):
    """Sum over the four (dy, y) of the level below that make a row of this one, divided by the entries of its pools."""
    below += 2 * y * W * STRIDE
    row1 = below + ((dy + DY_COUNT) % DY_COUNT).to(tl.int64) * (2 * H * W * STRIDE)  # beyond 2^31 at 256x256 pixels
    row2 = below + ((dy + DY_COUNT + 1) % DY_COUNT).to(tl.int64) * (2 * H * W * STRIDE)
    row3 = below + ((dy + DY_COUNT - 1) % DY_COUNT).to(tl.int64) * (2 * H * W * STRIDE) + W * STRIDE
    row = ()
    for k in tl.static_range(WIDTH):
        x = (start + k + (W - 1) * STEPS) % W * STRIDE
        total = tl.load(row1 + x) + tl.load(row1 + W * STRIDE + x) + tl.load(row2 + x) + tl.load(row3 + x)
        row = row + (total * 0.0625,)
    return row


@triton.jit(do_not_specialize=["first", "pairs"])
def level(
    left,
    right,
    below,
    out,
    index1,
    index2,
    first,
    pairs,
    WEIGHTS: tl.constexpr,  # of the steps, like the next four
    BIASES: tl.constexpr,
    NAMES: tl.constexpr,
    SLOPES: tl.constexpr,
    TABLES: tl.constexpr,  # their first planes
    NTK: tl.constexpr,
    POOL: tl.constexpr,  # a level follows
    CHANNELS: tl.constexpr,  # of the images; 0 where a level lies below
    PLANES: tl.constexpr,  # rows of `left` and `right`: channels, then two tables an activation
    H: tl.constexpr,
    W: tl.constexpr,
    DY_COUNT: tl.constexpr,
    DY_RADIUS: tl.constexpr,
    DX_COUNT: tl.constexpr,
    DX_RADIUS: tl.constexpr,
    BELOW_DY_COUNT: tl.constexpr,
    BELOW_DY_RADIUS: tl.constexpr,
    NEXT_DX_COUNT: tl.constexpr,
    NEXT_DX_RADIUS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Run one level: GROUPS (pair, dy), all their dx, COLUMNS of x; indices beyond an end repeat the last, unstored."""
    STEPS: tl.constexpr = len(NAMES)
    TENSORS: tl.constexpr = 2 if NTK else 1
    EXTENT: tl.constexpr = CHUNKS * COLUMNS + 2 * STEPS + W
    PLANE: tl.constexpr = H * EXTENT
    STRIDE: tl.constexpr = TENSORS * DX_COUNT
    WIDTH: tl.constexpr = COLUMNS + 2 * STEPS
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    valid = (group < pairs * DY_COUNT) & (lane < DX_COUNT)
    group = tl.minimum(group, pairs * DY_COUNT - 1) + 0 * lane
    lane = tl.minimum(lane, DX_COUNT - 1) + 0 * group
    start = tl.program_id(1) * COLUMNS + 0 * lane
    pair, dy_index = group // DY_COUNT, group % DY_COUNT
    dy = (dy_index - DY_RADIUS + H) % H
    dx = (lane - DX_RADIUS + W) % W
    image1 = left + tl.load(index1 + first + pair).to(tl.int64) * (PLANES * PLANE) + start
    image2 = right + tl.load(index2 + first + pair).to(tl.int64) * (PLANES * PLANE) + start + dx
    below += pair.to(tl.int64) * (BELOW_DY_COUNT * 2 * H * W * STRIDE) + lane
    zero = tl.full((GROUPS, LANES), 0.0, left.dtype.element_ty)

    links = ()  # 0 between columns k and k + 1 where x or x' wraps, else 1
    for k in tl.static_range(WIDTH - 1):
        x = (start + k + 1 + (W - 1) * STEPS) % W
        links = links + (tl.where((x != 0) & ((x + dx) % W != 0), 1.0, 0.0),)
    states = ()  # of each step: of its NNGP, then of its NTK, the sum of the last two rows and the last one
    for s in tl.static_range(STEPS):
        rows = _constant_row(zero, WIDTH - 2 * s - 2)
        second = _constant_row(zero, WIDTH - 2 * s - 2 if NTK and (s > 0 or CHANNELS == 0) else 0)
        states = states + (rows, rows, second, second)
    total_nngp, total_ntk = zero, zero

    for t in range(H + STEPS):
        y = t % H
        if CHANNELS > 0:
            nngp = _image_row(image1 + y * EXTENT, image2 + (t + dy) % H * EXTENT, CHANNELS, PLANE, WIDTH)
            ntk = nngp  # not read: the first convolution gives its NTK
        else:
            e = 2 * (dy_index - DY_RADIUS) + BELOW_DY_RADIUS
            nngp = _pooled_row(below, e, y, start, H, W, STRIDE, BELOW_DY_COUNT, STEPS, WIDTH)
            ntk = nngp
            if NTK:
                ntk = _pooled_row(below + DX_COUNT, e, y, start, H, W, STRIDE, BELOW_DY_COUNT, STEPS, WIDTH)
        new_states = ()
        for s in tl.static_range(STEPS):
            y = t + STEPS * H - s  # of the row that comes in
            keep = tl.where((y % H != 0) & ((y + dy) % H != 0), 1.0, 0.0)
            boxed, sums, previous = _box(nngp, states[4 * s], states[4 * s + 1], links, keep, s)
            new_states = new_states + (sums, previous)
            nngp = ()
            for k in tl.static_range(len(boxed)):
                nngp = nngp + (WEIGHTS[s] * boxed[k] + BIASES[s],)
            if NTK and (s > 0 or CHANNELS == 0):
                boxed, sums, previous = _box(ntk, states[4 * s + 2], states[4 * s + 3], links, keep, s)
                new_states = new_states + (sums, previous)
                ntk = ()
                for k in tl.static_range(len(boxed)):
                    ntk = ntk + (WEIGHTS[s] * boxed[k] + nngp[k],)
            else:
                new_states = new_states + ((), ())
                ntk = nngp
            if NAMES[s] != "linear":
                row1 = image1 + TABLES[s] * PLANE + (y - 1) % H * EXTENT + s + 1
                row2 = image2 + TABLES[s] * PLANE + (y - 1 + dy) % H * EXTENT + s + 1
                new_nngp, new_ntk = (), ()
                for k in tl.static_range(len(boxed)):
                    a = tl.load(row1 + k) * tl.load(row2 + k)
                    inverse1, inverse2 = tl.load(row1 + PLANE + k), tl.load(row2 + PLANE + k)
                    value, derivative = _dual_activation(nngp[k], a, inverse1, inverse2, NAMES, SLOPES, s)
                    new_nngp = new_nngp + (value,)
                    new_ntk = new_ntk + (derivative * ntk[k],)
                nngp, ntk = new_nngp, new_ntk
        states = new_states

        row = t - STEPS + 0 * lane
        if POOL:
            OUT_STRIDE: tl.constexpr = TENSORS * NEXT_DX_COUNT
            next_dx = (dx // 2 + NEXT_DX_RADIUS) % (W // 2)
            target = out + (pair.to(tl.int64) * DY_COUNT + dy_index) * (H * (W // 2) * OUT_STRIDE) + next_dx
            stored = valid & (row >= 0) & (dx % 2 == 0) & (next_dx < NEXT_DX_COUNT)
            for k in tl.static_range(0, COLUMNS, 2):
                cell = target + (row * (W // 2) + (start + k) // 2) * OUT_STRIDE
                inside = stored & (start + k < W)
                tl.store(cell, _pool_x(nngp[k], nngp[k + 1], lane, DX_COUNT), mask=inside)
                if NTK:
                    tl.store(cell + NEXT_DX_COUNT, _pool_x(ntk[k], ntk[k + 1], lane, DX_COUNT), mask=inside)
        else:
            for k in tl.static_range(COLUMNS):
                inside = (row >= 0) & (start + k < W)
                total_nngp += tl.where(inside, nngp[k], 0.0)
                total_ntk += tl.where(inside, ntk[k], 0.0)

    if not POOL:
        target = out + ((first + pair).to(tl.int64) * DY_COUNT + dy_index) * (CHUNKS * STRIDE)
        target += tl.program_id(1) * STRIDE + lane
        tl.store(target, total_nngp, mask=valid)
        if NTK:
            tl.store(target + DX_COUNT, total_ntk, mask=valid)


@triton.jit
def _pool_x(a, b, lane, DX_COUNT: tl.constexpr):
    """Sum the 2x2 pixels (x, x') of a block, in the lanes of even dx: a at x even and b at x odd."""
    return a + b + tl.gather(a, (lane + 1) % DX_COUNT, 1) + tl.gather(b, (lane + DX_COUNT - 1) % DX_COUNT, 1)
