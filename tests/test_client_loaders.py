"""The first samples of loaders that other packages make: their data sets, collators and batches."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ntk_lightning.datamodules.from_loaders import first_samples


def test_data_sets_of_the_hub_are_read_in_one_piece() -> None:
    table = datasets.Dataset.from_dict({"x": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "label": [0, 1, 1]})
    read = first_samples(DataLoader(table.with_format("torch"), batch_size=2, shuffle=True), 3)
    assert read.x["x"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert read.y.tolist() == [0, 1, 1]
    stream = table.to_iterable_dataset().with_format("torch")
    assert first_samples(DataLoader(stream, batch_size=2), 2).x["x"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.ci
def test_sentences_are_padded_to_one_length_by_a_collator_of_transformers() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    sentences = [{**tokenizer(text), "labels": i % 2} for i, text in enumerate(["a b", "a", "b b a"])]
    collate = DataCollatorWithPadding(tokenizer)
    read = first_samples(DataLoader(sentences, batch_size=1, collate_fn=collate), 3)
    assert type(read.x) is BatchEncoding
    assert read.x["input_ids"].tolist() == [[1, 2, 0], [1, 0, 0], [2, 2, 1]]
    assert read.x["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert read.y.tolist() == [0, 1, 0]
    moved = read.take(slice(1, None)).to("cpu", torch.float64)
    assert type(moved.x) is BatchEncoding
    assert moved.x["input_ids"].dtype == torch.int64


@pytest.mark.ci
def test_batches_of_pytorch_forecasting_need_a_function_of_the_batch() -> None:
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet

    series = pd.DataFrame({"value": np.arange(40.0) % 7, "time": [*range(20)] * 2, "group": ["a"] * 20 + ["b"] * 20})
    windows = TimeSeriesDataSet(
        series,
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=5,
        max_prediction_length=1,
        time_varying_unknown_reals=["value"],
    )
    loader = windows.to_dataloader(train=True, batch_size=4)
    read = first_samples(loader, 6, lambda batch: ((batch[0],), batch[1][0]))
    x, (y, _) = next(iter(windows.to_dataloader(train=False, batch_size=6)))
    assert torch.equal(read.y, y)
    assert torch.equal(read.x[0]["encoder_cont"], x["encoder_cont"])
    with pytest.raises(TypeError, match=r"must be a tensor, got tuple: give samples="):
        first_samples(loader, 6)
