"""How the documentation is built: ``make docs``, or sphinx-build with this folder as its source.

The build needs no network. Set ``TELME_KD_DOCS_INTERSPHINX=1`` to link names of Python and PyTorch
to their documentation, which does.
"""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_extensions"), str(DOCS.parent)]

from telme_kd import __version__  # noqa: E402 - found through the line above

project = "telme-kd"
author = "The telme-kd developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    "sphinx-mathjax-offline",  # after sphinx.ext.mathjax: formulas without a network
    "committed_results",
    "performance_results",
    "scaling_results",
    "experiment_results",
]
exclude_patterns = ["_build", "_generated"]
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|collections|contextlib|typing)\..*"),
    (r"py:class", r"Tensor|Module|ProcessGroup|optional|telme_kd\.accumulation\.Part"),
]

if os.environ.get("TELME_KD_DOCS_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

# The tests of a page start from a fixed seed, with the warnings on small batches off: they come
# once per process, and so at another place whenever a page is added.
doctest_global_setup = """
import warnings

import torch

from telme_kd.errors import DegenerateBatchWarning

warnings.simplefilter("ignore", DegenerateBatchWarning)
torch.manual_seed(0)
"""

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"telme-kd {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
