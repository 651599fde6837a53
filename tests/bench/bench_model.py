"""One training step (forward, backward, AdamW) beside transformers with torch on the CPU: same
weights, same samples, float32, same number of threads, one run.

    python tests/bench/bench_model.py [tiny] [small] [moe16] [moe64] [--threads 1,2] [--repeats 5]

Needs torch and transformers.  The peer gets each of its ways (eager or SDPA attention; eager,
batched or grouped experts; --compile adds torch.compile) and its fastest counts.  It pads samples
to the longest of the batch, as its users do; tokens per second count real tokens.
"""
import argparse
import resource
import subprocess
import sys
import time

import numpy as np

import orchvlm

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
    "small": (config(640, 12, 10, 2, 64, 1792, 16384, (8, 512, 8, 2048)), 4096),
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


def ours_step(values, samples, pixels, state, threads):
    from model_cases import positions
    model = orchvlm.Model(values, threads=threads)
    model.load_state_dict(state)
    opt = orchvlm.AdamW(model, lr=1e-4)
    ids = np.concatenate([s[0] for s in samples])
    inputs = orchvlm.Inputs(
        input_ids=ids, cu_seqlens=np.cumsum([0] + [len(s[0]) for s in samples]),
        position_ids=np.concatenate([positions(s[0], [(IMAGE, *s[1])]) for s in samples], axis=1),
        labels=np.where(ids >= 6, ids, -100), pixels=np.concatenate(pixels),
        grid_thw=[s[1] for s in samples])

    def step():
        model.zero_grad()
        loss = model.forward(inputs).loss
        model.backward()
        opt.step()
        return loss
    return step


def theirs_step(model, samples, pixels, attention, experts, compiled):
    import torch
    model.set_attn_implementation(attention)
    if experts:
        model.set_experts_implementation(experts)
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
    if experts:
        given["output_router_logits"] = True
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), foreach=True)
    call = torch.compile(model) if compiled else model

    def step():
        opt.zero_grad()
        loss = call(**given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        return float(loss.detach())
    return step


def time_step(step, repeats):
    first = step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return first, float(np.median(times))


def peak_mib(case, who, threads):
    """Peak resident memory of a process of its own that runs two steps, less one that runs none."""
    sizes = []
    for steps in (0, 2):
        done = subprocess.run([sys.executable, __file__, "--memory", who, case, "--threads",
                               str(threads), "--repeats", str(steps)], capture_output=True,
                              text=True, check=True)
        sizes.append(float(done.stdout.split()[-1]))
    return sizes[1] - sizes[0]


def run_memory(case, who, threads, steps):
    values, tokens = CASES[case]
    samples, pixels = batch(values, tokens)
    if who == "ours":
        step = ours_step(values, samples, pixels, fresh_state(values), threads) if steps else None
    else:
        import torch
        from oracle_cases import build
        torch.set_num_threads(threads)
        model = build(values, np.random.default_rng(0)) if steps else None
        step = theirs_step(model, samples, pixels, "sdpa", None, False) if steps else None
    for _ in range(steps):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def fresh_state(values):
    return orchvlm.Model.from_config(values, seed=0).state_dict()


def run_case(case, threads, repeats, compiled):
    import torch
    from oracle_cases import build, state_of
    torch.set_num_threads(threads)
    values, tokens = CASES[case]
    samples, pixels = batch(values, tokens)
    model = build(values, np.random.default_rng(0))
    state = {name: array.copy() for name, array in state_of(model).items()}
    loss, ours = time_step(ours_step(values, samples, pixels, state, threads), repeats)
    real = sum(len(s[0]) for s in samples)
    print(f"{case}: {len(state)} tensors, {sum(a.size for a in state.values()) / 1e6:.1f}M "
          f"parameters, {real} tokens, {sum(len(p) for p in pixels)} patches, {threads} threads")
    print(f"  {'orchvlm':18} {ours * 1e3:8.1f} ms  {real / ours:8.0f} tokens/s  loss {loss:.6f}")
    best, eager = np.inf, np.inf
    for experts in (("eager", "batched_mm", "grouped_mm") if "moe" in case else (None,)):
        for attention in ("eager", "sdpa"):
            for comp in (False, True) if compiled else (False,):
                name = "/".join(filter(None, (attention, experts, comp and "compile")))
                try:
                    model.load_state_dict(model.state_dict())
                    theirs, took = time_step(theirs_step(model, samples, pixels, attention, experts,
                                                         comp), repeats)
                except Exception as error:  # a way that this build of the peer does not have
                    print(f"  {name:18} not available: {str(error).splitlines()[0][:60]}")
                    continue
                best = min(best, took)
                eager = min(eager, took) if experts in (None, "eager") else eager
                print(f"  {name:18} {took * 1e3:8.1f} ms  {real / took:8.0f} tokens/s  "
                      f"ratio {took / ours:.2f}")
    print(f"  ratio to the fastest {best / ours:.2f}, to eager experts {eager / ours:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", choices=("ours", "theirs", "both"))
    given = parser.parse_args()
    cases = given.cases or list(CASES)
    if given.memory in ("ours", "theirs"):
        return run_memory(cases[0], given.memory, int(given.threads.split(",")[0]), given.repeats)
    for case in cases:
        if given.memory == "both":
            mine, other = (peak_mib(case, who, 2) for who in ("ours", "theirs"))
            print(f"{case}: peak of a step {mine:.0f} MiB, transformers {other:.0f} MiB, "
                  f"ratio {mine / other:.2f}")
            continue
        for threads in map(int, given.threads.split(",")):
            run_case(case, threads, given.repeats, given.compile)
    return None


if __name__ == "__main__":
    main()
