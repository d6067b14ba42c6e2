"""Train a Llama on Transformer Engine layers with transformers' Trainer, on packed sequences.

    python examples/train_with_trainer.py --steps 20 --output ./trained

Without a GPU the script trains the reference layers in float32. Run the same command again to continue from the last
checkpoint. Several GPUs: torchrun --nproc-per-node N examples/train_with_trainer.py ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from small_llama import default_llama, load_llama, paragraphs
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from llama_te_convert import convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_core import DataCollatorWithFlattening


def main() -> None:
    options = parse_options()
    set_seed(0)
    hf, tokenizer = load_llama(options.model)
    model = convert_llama_hf_to_te(hf)
    samples = [tokenizer(text) for text in paragraphs(longest=400)]
    held_out = samples[::10]

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            bf16=torch.cuda.is_available(),
            logging_steps=max(1, options.steps // 10),
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 2),
            save_steps=max(1, options.steps // 2),
            save_total_limit=2,
            load_best_model_at_end=True,
            report_to="none",
        ),
        train_dataset=[sample for number, sample in enumerate(samples) if number % 10],
        eval_dataset=held_out,
        # A row of whole sequences without padding; FP8 asks for a multiple of 16 tokens.
        data_collator=DataCollatorWithFlattening(
            DataCollatorForLanguageModeling(tokenizer, mlm=False), pad_to_multiple_of=16
        ),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    last = get_last_checkpoint(str(options.output)) if options.output.exists() else None
    trainer.train(resume_from_checkpoint=last)
    print(f"Loss on held-out text: {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after.")

    if trainer.is_world_process_zero():
        trainer.save_model(str(options.output / "te"))
        convert_llama_te_to_hf(model).save_pretrained(options.output / "hf")
        tokenizer.save_pretrained(options.output / "hf")
        print(f"Saved: {options.output / 'te'}, and for transformers {options.output / 'hf'}.")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=default_llama(),
        help='folder in Hugging Face format, "smollm2" or "random" (here: %(default)s)',
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("trained"), help="folder of checkpoints and results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
