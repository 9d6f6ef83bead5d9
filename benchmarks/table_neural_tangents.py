# ruff: noqa: ANN001, ANN201, ANN202 - arrays of jax, which is not in the environment that checks types
"""One implementation of neural-tangents on one row of the table, in its own interpreter: a kernel for every line read.

python table_neural_tangents.py ARRAYS.npz NETWORK FULL IMPLEMENTATION THREADS
"""

import os
import sys
import time

path, network, full, implementation, threads = sys.argv[1], sys.argv[2], sys.argv[3] == "full", *sys.argv[4:6]
if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it may use cores
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(threads)]))

import jax  # noqa: E402 - it looks at the cores when it is imported
import jax.numpy as jnp  # noqa: E402
import neural_tangents as nt  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax, nn  # noqa: E402

arrays = dict(np.load(path, allow_pickle=False))
x = arrays.pop("x")
trained = {name: a for name, a in arrays.items() if "running" not in name}
fixed = {name: a for name, a in arrays.items() if "running" in name}


def conv(w, h, stride=1):
    pad = (w.shape[0] - 1) // 2
    return lax.conv_general_dilated(h, w, (stride,) * 2, [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pool(h):
    return lax.reduce_window(h, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


def ntk(w):
    return w * (2 / np.prod(w.shape[:-1])) ** 0.5  # weight_std = sqrt(2)


def myrtle(p, h):
    a, b, c, d, readout = (ntk(w) for w in p.values())
    h = pool(nn.relu(conv(b, nn.relu(conv(a, h)))))
    h = nn.relu(conv(d, pool(nn.relu(conv(c, h)))))
    return h.mean((1, 2)) @ readout


def mlp(p, h):
    *hidden, readout = (ntk(w) for w in p.values())
    for w in hidden:
        h = nn.relu(h @ w)
    return h @ readout


def resnet(p, h):
    def norm(name, z):
        scale = p[f"{name}.weight"] / jnp.sqrt(fixed[f"{name}.running_var"] + 1e-5)
        return (z - fixed[f"{name}.running_mean"]) * scale + p[f"{name}.bias"]

    h = nn.relu(norm("1", conv(p["0.weight"], h)))
    for i in range(3, 11):
        stride = 2 if i in (5, 7, 9) else 1
        z = nn.relu(norm(f"{i}.bn1", conv(p[f"{i}.conv1.weight"], h, stride)))
        z = norm(f"{i}.bn2", conv(p[f"{i}.conv2.weight"], z))
        if stride > 1:
            h = norm(f"{i}.shortcut.1", conv(p[f"{i}.shortcut.0.weight"], h, stride))
        h = nn.relu(z + h)
    return h.mean((1, 2)) @ p["13.weight"] + p["13.bias"]


def layer_norm(p, name, z):
    mean, var = z.mean(-1, keepdims=True), z.var(-1, keepdims=True)
    return (z - mean) / jnp.sqrt(var + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(p, name, z):
    return z @ p[f"{name}.weight"] + p[f"{name}.bias"]


def attention(qkv, heads, causal):
    n, t, d = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (z.reshape(n, t, heads, d // heads).transpose(0, 2, 1, 3) for z in jnp.split(qkv, 3, -1))
    scores = q @ k.swapaxes(-1, -2) / (d // heads) ** 0.5
    if causal:
        scores = jnp.where(np.tril(np.ones((t, t), bool)), scores, -jnp.inf)
    return (nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(n, t, d)


def encoder(p, h):
    for i in range(4):
        name = f"encoder.layers.{i}"
        qkv = h @ p[f"{name}.self_attn.in_proj_weight"] + p[f"{name}.self_attn.in_proj_bias"]
        h = layer_norm(p, f"{name}.norm1", h + linear(p, f"{name}.self_attn.out_proj", attention(qkv, 4, False)))
        z = linear(p, f"{name}.linear2", nn.relu(linear(p, f"{name}.linear1", h)))
        h = layer_norm(p, f"{name}.norm2", h + z)
    return linear(p, "readout", h.mean(1))


def gpt(p, ids):
    h = p["token.weight"][ids.astype(int)] + p["position.weight"]
    for i in range(4):
        name = f"blocks.{i}"
        qkv = linear(p, f"{name}.qkv", layer_norm(p, f"{name}.norm1", h))
        h = h + linear(p, f"{name}.out", attention(qkv, 4, True))
        z = linear(p, f"{name}.up", layer_norm(p, f"{name}.norm2", h))
        h = h + linear(p, f"{name}.down", nn.gelu(z))
    return linear(p, "readout", layer_norm(p, "norm", h)[:, -1])


networks = {"myrtle": myrtle, "mlp": mlp, "resnet": resnet, "encoder": encoder, "gpt": gpt}
kernel = jax.jit(
    nt.empirical_ntk_fn(
        networks[network],
        vmap_axes=0,
        trace_axes=() if full else (-1,),
        implementation=getattr(nt.NtkImplementation, implementation),
    )
)
for line in sys.stdin:
    start = time.perf_counter()
    gram = np.asarray(kernel(x, None, trained))
    seconds = time.perf_counter() - start
    if line.strip():  # keep the kernel
        np.save(line.strip(), gram)
    print(f"seconds {seconds}", flush=True)
