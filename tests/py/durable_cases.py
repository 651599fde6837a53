"""Quick runs over ranks, of a model that is as small as they come, on words."""
import numpy as np

import orchvlm
from orchvlm import data

CONFIG = orchvlm.preset("tiny").values
CONFIG["vision_config"] |= {"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16,
                            "out_hidden_size": 16, "adapter_hidden_size": 16}
CONFIG["text_config"] |= {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16,
                          "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}


def samples(n=40, seed=0):
    """Chats of some letters."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh "), rng.integers(1, 20))) for _ in range(2 * n)]
    return [{"messages": [{"role": "user", "content": words[2 * k]},
                          {"role": "assistant", "content": words[2 * k + 1]}]} for k in range(n)]


def made(comm, folder, steps=6, *, tokens=150, dtype="float32", source=None, processor=None,
         values=CONFIG, **settings):
    """A trainer: the same batches on any number of ranks."""
    model = orchvlm.Model.from_config(orchvlm.ModelConfig(values), seed=0, threads=1, dtype=dtype)
    source = data.Mixture([samples(), samples(9, seed=1)], seed=3) if source is None else source
    processor = processor or data.Processor.from_config(CONFIG)
    loader = data.Loader(source, processor, tokens) if comm is None else \
        data.RankLoader(source, processor, tokens, comm)
    config = orchvlm.TrainingConfig(steps=steps, lr=3e-3, warmup=2, **settings)
    return orchvlm.Trainer(model, loader, config, folder, comm)


def losses(comm, folder, until=None, resume=False, **settings):
    """(losses of the steps that are taken, weights behind them)"""
    trainer, seen = made(comm, folder, **settings), []
    if resume:
        trainer.resume()
    for row in trainer.run():
        seen.append(row["loss"])
        if row["step"] == until:
            break
    return seen, trainer.model.state_dict()


def over(n, work, *args, **options):
    """What rank 0 gives, of n ranks that are threads; None: without a communicator."""
    if n is None:
        return work(None, *args, **options)
    return orchvlm.comm.run_threads(n, lambda comm: work(comm, *args, **options))[0]
