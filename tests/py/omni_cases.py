"""Freshly drawn tiny thinkers of Qwen3-Omni, and batches of text, images, videos and sounds."""
import numpy as np

import orchvlm
from model_cases import (END, FIRST_TEXT, IDS, IMAGE, START, VIDEO, draw_config, draw_samples,
                         pack)

AUDIO, AUDIO_START, AUDIO_END = 5, 6, 7
WORD = FIRST_TEXT + 2  # text is from here on
OMNI_IDS = {**IDS, "audio_token_id": AUDIO, "audio_start_token_id": AUDIO_START,
            "audio_end_token_id": AUDIO_END}
CHUNK = 100  # frames that the encoder convolves at once; 13 tokens


def draw_omni_config(rng, sparse=True):
    """A thinker's, as a dict: a Qwen3-VL-MoE with an audio encoder."""
    base = draw_config(rng, sparse)
    heads = int(rng.integers(1, 4))
    width = heads * 2 * int(rng.integers(2, 6))
    audio = {"d_model": width, "encoder_layers": int(rng.integers(1, 4)),
             "encoder_attention_heads": heads, "encoder_ffn_dim": int(rng.integers(9, 40)),
             "num_mel_bins": int(rng.integers(1, 20)), "n_window": 50,
             "downsample_hidden_size": int(rng.integers(2, 7)),
             "n_window_infer": int(rng.integers(100, 400)),
             "activation_function": "gelu", "output_dim": base["text_config"]["hidden_size"]}
    base["text_config"] |= {"norm_topk_prob": bool(rng.random() < 0.7)}
    return {**base, **OMNI_IDS, "model_type": "qwen3_omni_moe_thinker", "audio_config": audio,
            "position_id_per_seconds": int(rng.integers(5, 30))}


def tokens_of(frames):
    """Tokens of a sound, by adding up its chunks."""
    total = 0
    while frames > 0:
        n = min(frames, CHUNK)
        for _ in range(3):
            n = (n + 1) // 2
        total += n
        frames -= CHUNK
    return total


def draw_omni_sample(rng, config, least, most):
    """(ids, media, positions): media are (kind, size, seconds per frame), in order."""
    vocab = config["text_config"]["vocab_size"]
    ids, media, places = [], [], []

    def text(count):
        ids.extend(int(t) for t in rng.integers(WORD, vocab, count))
        count_up(count)

    def count_up(count):
        at = max((max(place) for place in places), default=-1) + 1
        places.extend([(at + k,) * 3 for k in range(count)])

    def block(token, before, after, put):
        ids.append(before)
        count_up(1)
        n = put(max(places[-1]) + 1)
        ids.extend([token] * n + [after])
        count_up(1)

    text(rng.integers(1, 5))
    for _ in range(rng.integers(0, 4)):
        kind = rng.choice([AUDIO, AUDIO, IMAGE, VIDEO])
        if kind == AUDIO:
            frames = int(rng.integers(least, most))
            media.append((AUDIO, frames, 0.0))

            def put(at, n=tokens_of(frames)):
                places.extend([(at + k,) * 3 for k in range(n)])
                return n
            block(AUDIO, AUDIO_START, AUDIO_END, put)
        else:
            t = int(rng.integers(1, 4)) if kind == VIDEO else 1
            h, w = (int(2 * n) for n in rng.integers(1, 4, 2))
            seconds = float(rng.choice([0.5, 1.0, 2.0])) if kind == VIDEO else 0.0
            media.append((int(kind), (t, h, w), seconds))

            def put(at, t=t, h=h, w=w, step=seconds * config["position_id_per_seconds"]):
                places.extend([(at + f * step, at + r, at + c) for f in range(t)
                               for r in range(h // 2) for c in range(w // 2)])
                return t * h * w // 4
            block(int(kind), START, END, put)
        text(rng.integers(0, 4))
    return ids, media, places


def draw_omni_samples(rng, config, samples=3, sounds=(1, 330)):
    """[(ids, media, positions, labels, rows of each medium)]; sounds of so many frames, every batch
    with at least one of them and one picture."""
    vision = config["vision_config"]
    patch = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    while True:
        drawn = [draw_omni_sample(rng, config, *sounds) for _ in range(samples)]
        kinds = {kind for _, media, _ in drawn for kind, *_ in media}
        if AUDIO in kinds and IMAGE in kinds:
            break
    made = []
    for ids, media, places in drawn:
        wanted = (rng.random(len(ids)) < 0.7) & (np.array(ids) >= WORD)
        rows = [rng.standard_normal((size, config["audio_config"]["num_mel_bins"]) if kind == AUDIO
                                    else (np.prod(size), patch)).astype(np.float32)
                for kind, size, _ in media]
        made.append((ids, media, places, np.where(wanted, ids, -100), rows))
    return made


def pack_omni(samples):
    """Inputs of what draw_omni_samples gave."""
    owned = [(b, *medium, rows) for b, (_, media, _, _, some) in enumerate(samples)
             for medium, rows in zip(media, some)]
    heard = [one for one in owned if one[1] == AUDIO]
    seen = [one for one in owned if one[1] != AUDIO]
    fields = {}
    if heard:
        fields |= {"mel": np.concatenate([one[4] for one in heard]),
                   "mel_lengths": [one[2] for one in heard],
                   "mel_sample": [one[0] for one in heard]}
    if seen:
        fields |= {"pixels": np.concatenate([one[4] for one in seen]),
                   "grid_thw": [one[2] for one in seen], "grid_sample": [one[0] for one in seen]}
    return orchvlm.Inputs(
        input_ids=np.concatenate([ids for ids, *_ in samples]),
        cu_seqlens=np.cumsum([0] + [len(ids) for ids, *_ in samples]),
        position_ids=np.concatenate([places for _, _, places, *_ in samples]).T,
        labels=np.concatenate([labels for *_, labels, _ in samples]), **fields)


def draw_any(rng, config, samples=3):
    """Samples of whatever family."""
    drawer = draw_omni_samples if "audio_config" in config else draw_samples
    return drawer(rng, config, samples)


def pack_any(samples):
    """Inputs of what draw_any gave."""
    return pack_omni(samples) if samples and len(samples[0]) == 5 else pack(samples)
