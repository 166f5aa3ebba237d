"""Our file is the library's, byte by byte."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from axolotl.core.safetensors_file import DTYPES, write_safetensors


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"text": 'ü " \\ \n'}])
def test_every_type_and_shape_is_written_as_the_library_writes_it(tmp_path, metadata):
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        for shape in ((3, 5), (1,), (), (0, 4)):
            values = torch.randint(0, 2, shape, dtype=torch.uint8)
            # This type has no zero and no conversion.
            tensor = values.view(dtype) if dtype == torch.float8_e8m0fnu else values.to(dtype)
            tensors[f"{'zaä'[number % 3]}.{number}.{shape}"] = tensor
    save_file(tensors, tmp_path / "theirs", metadata)
    write_safetensors(tensors, tmp_path / "ours", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_the_table_lacks_is_left_to_the_library(tmp_path):
    tensors = {"a": torch.zeros(2, dtype=torch.complex64), "b": torch.ones(3)}
    write_safetensors(tensors, tmp_path / "file", {"one": "1", "two": "2"})
    assert torch.equal(load_file(tmp_path / "file")["b"], tensors["b"])
