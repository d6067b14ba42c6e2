"""Fine-tune a Llama on Transformer Engine layers with LoRA and PEFT, and use the adapter in transformers.

    python examples/lora.py --steps 20 --output ./adapted

The output folder has the adapter twice: adapter/ fits the model with Transformer Engine layers, and adapter-hf/ fits
the Hugging Face model and the servers that run it. hf/ has the model with the adapter merged. The script exits with an
error if these models compute different logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_llama import default_llama, load_llama, paragraphs
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed

from llama_te_convert import convert_adapter, convert_llama_hf_to_te, convert_llama_te_to_hf
from llama_te_core import DataCollatorWithFlattening
from llama_te_core.lora import on_weights

# Bounds for the difference of logits, relative to the largest: order of summation in float32, rounding in bfloat16.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def main() -> None:
    options = parse_options()
    set_seed(0)
    hf, tokenizer = load_llama(options.model)
    hf.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16 if torch.cuda.is_available() else None)
    base = convert_llama_hf_to_te(hf)
    hf = convert_llama_te_to_hf(base)  # ordinary weights, even if the source is a GGUF file
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, task_type="CAUSAL_LM")
    model = get_peft_model(base, on_weights(config))
    model.print_trainable_parameters()

    samples = [tokenizer(text) for text in paragraphs(longest=400)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=options.learning_rate,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=samples,
        data_collator=DataCollatorWithFlattening(
            DataCollatorForLanguageModeling(tokenizer, mlm=False), pad_to_multiple_of=16
        ),
    )
    trainer.train()
    model.eval()
    model.save_pretrained(options.output / "adapter")
    hf.save_pretrained(options.output / "base-hf")
    adapted = convert_adapter(
        options.output / "adapter", options.output / "adapter-hf", base=str(options.output / "base-hf")
    )
    print(f"Adapter of {len(adapted)} Hugging Face weights in {options.output / 'adapter-hf'}.")

    inputs = tokenizer("Two and two make", return_tensors="pt").to(hf.device)
    with torch.no_grad():
        expected = model(**inputs).logits
        on_hf = PeftModel.from_pretrained(hf, options.output / "adapter-hf").eval()(**inputs).logits
        merged = convert_llama_te_to_hf(model.merge_and_unload()).eval()
        merged.save_pretrained(options.output / "hf")
        tokenizer.save_pretrained(options.output / "hf")
        on_merged = merged(**inputs).logits
    bound = BOUNDS[expected.dtype]
    for name, logits in (("adapter on the Hugging Face model", on_hf), ("merged Hugging Face model", on_merged)):
        distance = float((logits - expected).abs().max() / expected.abs().max())
        print(f"Logits of the {name}: {distance:.1e} away (allowed: {bound:.0e}).")
        if not distance <= bound:
            raise SystemExit(f"the logits of the {name} differ by more than the bound")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=default_llama(),
        help='a folder in the Hugging Face format, "smollm2" or "random" (default here: %(default)s)',
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--output", type=Path, default=Path("adapted"), help="the folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
