"""sentence-transformers embeds, scores and trains with both models alike.

Bound: see `conftest.BOUND`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import LlamaForSequenceClassification

from clients.conftest import BOUND, history

TEXTS = ["The sky is blue.", "Two and two make four, as everybody knows.", "Yes.", "Fire is hot."]


def embedder(folder: Path, pooling: str = "mean") -> SentenceTransformer:
    transformer = Transformer(str(folder))
    pool = Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling)
    return SentenceTransformer(modules=[transformer, pool], device="cpu")


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_embeddings(pooling: str, folders: tuple[Path, Path]) -> None:
    expected, ours = (embedder(folder, pooling).encode(TEXTS, batch_size=3) for folder in folders)
    assert ours.shape == (4, 64)
    np.testing.assert_allclose(ours, expected, atol=BOUND)


def test_training_and_the_saved_model(folders: tuple[Path, Path]) -> None:
    data = Dataset.from_dict({"anchor": TEXTS * 2, "positive": [text.lower() for text in TEXTS] * 2})
    results = []
    for folder in folders:
        model = embedder(folder)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir="trained",
                max_steps=3,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=data,
            loss=MultipleNegativesRankingLoss(model),
        )
        trainer.train()
        model.save(f"{folder.name}-trained")
        embeddings = model.encode(TEXTS)
        again = SentenceTransformer(f"{folder.name}-trained", device="cpu")
        np.testing.assert_allclose(again.encode(TEXTS), embeddings, atol=1e-6)
        results.append((history(trainer), embeddings))
    (expected, expected_embeddings), (ours, embeddings) = results
    assert len(ours) == 3 and ours == pytest.approx(expected, abs=BOUND)
    np.testing.assert_allclose(embeddings, expected_embeddings, atol=5e-3)


def test_scores_of_pairs(make_pair: Any, tokenizer: Any, tmp_path: Path) -> None:
    pair = make_pair(LlamaForSequenceClassification, hf_fields={"num_labels": 1})
    scores = []
    for name, model in pair._asdict().items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        encoder = CrossEncoder(str(tmp_path / name), device="cpu")
        scores.append(encoder.predict([(TEXTS[0], text) for text in TEXTS], batch_size=3))
    np.testing.assert_allclose(scores[1], scores[0], atol=BOUND)
    assert np.ptp(scores[0]) > 1e-2
