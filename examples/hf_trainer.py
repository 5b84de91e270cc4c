"""Fine-tune a small BERT with the Trainer of transformers while SmartFRZ freezes what has converged.

    pip install "smartfrz[hf,cpu]"
    python examples/hf_trainer.py --steps 200

The model is the pretrained MiniLM if `recipes/fetch.py` has fetched it, else a tiny BERT from scratch. The task, so that
nothing has to be downloaded: does a sentence mention an animal?
"""

import argparse
import random
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    Trainer,
    TrainingArguments,
)

from smartfrz.adapters.torch.hf import SmartFRZCallback

MINILM = Path(__file__).parent.parent / "recipes" / "cache" / "minilm"
ANIMALS = ["cat", "dog", "horse", "bird", "fish", "mouse", "lion", "wolf"]
THINGS = ["table", "river", "book", "house", "car", "stone", "cloud", "song"]


def sentences(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        label = rng.randrange(2)
        objects = [rng.choice(THINGS), rng.choice(ANIMALS if label else THINGS)]
        rng.shuffle(objects)
        yield f"we saw the {objects[0]} and the {objects[1]}", label


def tokenizer_and_model(folder):
    if folder:
        return AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "we", "saw", "the", "and", *ANIMALS, *THINGS]
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes))
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}), model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", default=MINILM if MINILM.exists() else "", help="folder; empty: a tiny model")
    parser.add_argument("--output", help="folder of the checkpoints; a temporary one by default")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer, model = tokenizer_and_model(options.model)
    train, test = (
        [dict(tokenizer(text), labels=label) for text, label in sentences(count, seed)]
        for seed, count in enumerate((2000, 200))
    )
    arguments = TrainingArguments(
        options.output or tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=5e-5 if options.model else 1e-3,
        logging_steps=max(1, options.steps // 10),
        save_steps=max(1, options.steps // 3),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    callback = SmartFRZCallback(verbose=False)  # the only line that SmartFRZ needs
    trainer = Trainer(
        model, arguments, train_dataset=train, eval_dataset=test, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=options.resume)  # checkpoints carry the state of SmartFRZ
    right = trainer.predict(test).predictions.argmax(-1) == [example["labels"] for example in test]
    print(f"test accuracy {right.mean():.1%}")
    print(callback.report())


if __name__ == "__main__":
    main()
