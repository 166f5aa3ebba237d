"""The list of models that is made is the one that transformers would read."""

from __future__ import annotations

import subprocess
import sys

from transformers.utils.import_utils import define_import_structure

from axolotl.loaders.models_package import FOLDER, names_of_models


def test_it_is_the_list_that_transformers_reads():
    read, made = define_import_structure(str(FOLDER / "__init__.py")), names_of_models()
    assert made == read
    assert [list(modules) for modules in made.values()] == [list(modules) for modules in read.values()]


def test_the_files_are_read_once_and_the_package_is_whole():
    script = """
import transformers
from transformers.utils import import_utils
from axolotl.loaders.models_package import import_models
read = import_utils.define_import_structure
times = read.cache_info().misses
import_models()
assert read.cache_info().misses == times, read.cache_info()
assert import_utils.define_import_structure is read
from transformers.models.llama import LlamaConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config
assert transformers.models.LlamaConfig is LlamaConfig is transformers.LlamaConfig
assert "llama" in dir(transformers.models)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
