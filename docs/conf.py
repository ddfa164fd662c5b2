"""How Sphinx makes the pages: ``pip install '.[docs]' && sphinx-build -W docs docs/_build``."""

import fastmb

project = "fastmb"
author = "fastmb developers"
copyright = author  # noqa: A001
release = version = fastmb.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"  # `Trainer.fit` in a docstring is a link where there is such a thing

myst_heading_anchors = 3
numpydoc_show_class_members = False  # the template of classes lists them
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc's parameter lists have the types
autosummary_ignore_module_all = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "/",  # all of them are run
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "remove_config_comments": True,
    "abort_on_example_error": True,
}

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"fastmb {release}"
html_show_sourcelink = False
html_show_sphinx = False


def _inside(app, docname, source):  # noqa: ARG001
    """Links that leave this folder lead to the page that includes what they lead to."""
    source[0] = source[0].replace("](../CHANGELOG.md", "](changes.md")


def setup(app):  # noqa: D103
    app.connect("source-read", _inside)
