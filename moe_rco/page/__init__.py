"""Reports as pages for a browser: one file each, which needs no network and runs no script."""

from moe_rco.page.render import FILE_NAME, compared, page, save, save_compared

__all__ = ["FILE_NAME", "compared", "page", "save", "save_compared"]
