"""One training step (forward, backward, AdamW) beside transformers with torch on the CPU: same
weights, same samples, float32, same number of threads.

    python tests/bench/bench_model.py [tiny] [small] [moe16] [moe64] [--threads 2]
        [--ways "sdpa/*"] [--micro 1,8] [--seconds 20]

Needs torch and transformers.  The peer gets each of its ways: eager or SDPA attention; eager,
batched or grouped experts; compiled or not; --ways chooses, and its fastest counts.  It pads
samples to the longest of the batch; "in 8" sorts them by length first and cuts them into eight
micro-batches with the same gradient, so that little is padded.  Tokens per second count real ones.

Every row is a process of its own.  Peak memory is the highest resident size during the steps, less
what the process held when its libraries were loaded: weights, gradients, moments, activations.  It
is compared with ours in as many micro-batches.
"""
import argparse
import json
import subprocess
import sys
import time
import zlib
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "py"))

IMAGE, START, END = 3, 1, 2


def config(hidden, layers, heads, kv, head_dim, mlp, vocab, vision, experts=0, top_k=2, expert=0):
    depth, width, vision_heads, vision_mlp = vision
    half = head_dim // 2
    text = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
            "head_dim": head_dim, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
                                "mrope_interleaved": True}}
    if experts:
        text |= {"num_experts": experts, "num_experts_per_tok": top_k, "mlp_only_layers": [],
                 "moe_intermediate_size": expert, "decoder_sparse_step": 1,
                 "router_aux_loss_coef": 0.001}
    return {"model_type": "qwen3_vl_moe" if experts else "qwen3_vl", "text_config": text,
            "vision_config": {"depth": depth, "hidden_size": width, "num_heads": vision_heads,
                              "intermediate_size": vision_mlp, "patch_size": 14,
                              "temporal_patch_size": 1, "spatial_merge_size": 2, "in_channels": 3,
                              "hidden_act": "gelu_pytorch_tanh", "out_hidden_size": hidden,
                              "num_position_embeddings": 256, "deepstack_visual_indexes": []},
            "image_token_id": IMAGE, "video_token_id": 4, "vision_start_token_id": START,
            "vision_end_token_id": END, "tie_word_embeddings": True}


TINY = (4, 192, 3, 768)
CASES = {  # configuration, tokens of a step, typical sample
    "tiny": (config(192, 6, 6, 2, 32, 512, 272, TINY), 2048),
    "small": (config(640, 16, 10, 2, 64, 1792, 16384, (8, 512, 8, 2048)), 4096),
    "moe16": (config(192, 4, 6, 2, 32, 512, 272, TINY, 16, 2, 128), 2048),
    "moe64": (config(256, 4, 8, 2, 32, 512, 272, TINY, 64, 4, 128), 2048),
}


def batch(values, tokens, seed=0):
    """Samples of long-tailed lengths, each with one image, packed and padded."""
    rng = np.random.default_rng(seed)
    samples, left = [], tokens
    while left > 24:
        h, w = 2 * rng.integers(2, 6, 2)
        text = int(min(np.exp(rng.normal(3.2, 0.7)) + 4, 400))
        ids = [START, *[IMAGE] * (h * w // 4), END,
               *rng.integers(6, values["text_config"]["vocab_size"], text)]
        if len(ids) > left:
            break
        samples.append((ids, (1, int(h), int(w))))
        left -= len(ids)
    pixels = [rng.standard_normal((h * w, 588)).astype(np.float32)
              for _, (_, h, w) in samples]
    return samples, pixels


def weights(name, shape):
    """The same on both sides, whoever asks, in the hub's layout."""
    from model_cases import scale_of
    mean, deviation = scale_of(name, shape)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return mean + deviation * rng.standard_normal(shape, np.float32)


def cut(samples, micro):
    """Places of samples, by length, in micro-batches of about equally many tokens."""
    if micro == 1:
        return [np.arange(len(samples))]
    order = np.argsort([len(s[0]) for s in samples])
    ends = np.cumsum([len(samples[i][0]) for i in order])
    parts = np.split(order, np.searchsorted(ends, ends[-1] / micro * np.arange(1, micro)))
    return [part for part in parts if len(part)]


def count_targets(samples):
    return sum(int((np.array(s[0][1:]) >= 6).sum()) for s in samples)


def packed(samples, pixels):
    import orchvlm
    from model_cases import positions
    ids = np.concatenate([s[0] for s in samples])
    return orchvlm.Inputs(
        input_ids=ids, cu_seqlens=np.cumsum([0] + [len(s[0]) for s in samples]),
        position_ids=np.concatenate([positions(s[0], [(IMAGE, *s[1])]) for s in samples], axis=1),
        labels=np.where(ids >= 6, ids, -100), pixels=np.concatenate(pixels),
        grid_thw=[s[1] for s in samples])


def ours_step(values, samples, pixels, threads, micro):
    import orchvlm
    model = orchvlm.Model(values, threads=threads)
    model.load_state_dict({name: weights(name, shape)
                           for name, shape in model.config.parameters().items()})
    opt = orchvlm.AdamW(model, lr=1e-4)
    inputs = [packed([samples[i] for i in part], [pixels[i] for i in part])
              for part in cut(samples, micro)]
    targets = count_targets(samples)

    def step():
        model.zero_grad()
        total = 0.0
        for one in inputs:
            total += model.forward(one, normalizer=targets).loss
            model.backward()
        opt.step()
        return total
    return step


def padded(samples, pixels, experts):
    """Arguments of the peer's forward."""
    import torch
    longest = max(len(s[0]) for s in samples)
    ids = np.zeros((len(samples), longest), np.int64)
    mask = np.zeros_like(ids)
    for i, (one, _) in enumerate(samples):
        ids[i, :len(one)], mask[i, :len(one)] = one, 1
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask),
             "labels": torch.from_numpy(np.where(ids >= 6, ids, -100)),
             "mm_token_type_ids": torch.from_numpy((ids == IMAGE).astype(np.int64)),
             "pixel_values": torch.from_numpy(np.concatenate(pixels)),
             "image_grid_thw": torch.tensor([s[1] for s in samples])}
    if experts != "dense":
        given["output_router_logits"] = True
    return given


def theirs_step(values, samples, pixels, threads, micro, attention, experts, compiled=None):
    import torch
    from oracle_cases import make, to_ours
    torch.set_num_threads(threads)
    model = make(values)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            turned = parameter.ndim == 3 and "experts" in name  # [E, out, in] there
            shape = tuple(parameter.shape)
            array = weights(name, (shape[0], shape[2], shape[1]) if turned else shape)
            parameter.copy_(torch.from_numpy(to_ours(name, array)))
    model.set_attn_implementation(attention)
    if experts != "dense":
        model.set_experts_implementation(experts)
    given, share = [], []
    for part in cut(samples, micro):
        chosen = [samples[i] for i in part]
        given.append(padded(chosen, [pixels[i] for i in part], experts))
        share.append(count_targets(chosen) / count_targets(samples))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), foreach=True)
    call = torch.compile(model) if compiled else model

    def step():
        opt.zero_grad()
        total = 0.0
        for one, part in zip(given, share):
            loss = call(**one).loss * part
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        return total
    return step


def resident_mib(which):
    """VmRSS (now) or VmHWM (highest)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    raise KeyError(which)


def run_row(case, way, threads, micro, seconds):
    """One warm-up step, then steps for about so many seconds: at least one, at most ten."""
    values, tokens = CASES[case]
    samples, pixels = batch(values, tokens)
    if way == "orchvlm":
        import orchvlm  # noqa: F401
        before = resident_mib("VmRSS")
        step = ours_step(values, samples, pixels, threads, micro)
    else:
        import oracle_cases  # noqa: F401
        import torch  # noqa: F401
        import transformers.models.qwen3_vl.modeling_qwen3_vl
        import transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe  # noqa: F401
        before = resident_mib("VmRSS")
        step = theirs_step(values, samples, pixels, threads, micro, *way.split("/"))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    loss, times = step(), []
    while not times or (sum(times) + times[-1] < seconds and len(times) < 10):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"loss": loss, "best_s": min(times), "median_s": float(np.median(times)),
            "steps": len(times), "peak_mib": resident_mib("VmHWM") - before,
            "tokens": sum(len(s[0]) for s in samples)}


def ways_of(case):
    attention = ("eager", "sdpa")
    experts = ("eager", "batched_mm", "grouped_mm") if "moe" in case else ("dense",)
    return ["/".join((a, e, *c)) for c, e, a in product(((), ("compile",)), experts, attention)]


def print_case(case, given):
    chosen = [way for way in ways_of(case)
              if any(fnmatchcase(way, pattern) for pattern in given.ways.split(","))]
    print(f"\n{case}, {given.threads} thread(s)\n\n| way | best ms | median ms | steps | tokens/s |"
          " peak MiB | loss | time / ours | memory ours / its |\n|" + " --- |" * 9, flush=True)
    ours, best, eager = None, np.inf, np.inf
    ours_peak = {}
    for way, micro in product(["orchvlm", *chosen], map(int, given.micro.split(","))):
        name = way if micro == 1 else f"{way} in {micro}"
        command = [sys.executable, __file__, case, "--threads", str(given.threads), "--seconds",
                   str(given.seconds), "--micro", str(micro), "--row", way]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=given.limit)
        except subprocess.TimeoutExpired:
            print(f"| {name} | not within {given.limit:.0f} s |", flush=True)
            continue
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
            print(f"| {name} | failed: {last[:90]} |", flush=True)
            if way == "orchvlm":
                return
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        ours = ours or row
        ratio = row["best_s"] / ours["best_s"]
        if way == "orchvlm":
            ours_peak[micro] = row["peak_mib"]
        else:
            best = min(best, ratio)
            eager = min(eager, ratio) if way.split("/")[1] in ("eager", "dense") else eager
        cells = [name, f"{row['best_s'] * 1e3:.0f}", f"{row['median_s'] * 1e3:.0f}", row["steps"],
                 f"{row['tokens'] / row['best_s']:.0f}", f"{row['peak_mib']:.0f}",
                 f"{row['loss']:.5f}", f"{ratio:.2f}", f"{ours_peak[micro] / row['peak_mib']:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print(f"\n{case}: {best:.2f} times as fast as the fastest of these, {eager:.2f} as eager "
          "experts", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[], metavar="case", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", default="*", help="patterns of the peer's ways, by commas")
    parser.add_argument("--micro", default="1,8", help="micro-batches of the peer, by commas")
    parser.add_argument("--seconds", type=float, default=20, help="of timed steps in a row")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a row may take")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(run_row(given.cases[0], given.row, given.threads, int(given.micro),
                                 given.seconds)))
        return
    for case in given.cases or list(CASES):
        print_case(case, given)


if __name__ == "__main__":
    main()
