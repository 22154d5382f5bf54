"""How the programs read their flags."""

import argparse

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, and exits with status 2."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the flags).\n")
