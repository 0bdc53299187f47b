"""Prefect's own command without the newer of its two UIs: `python -m flows.serving server start …`.

Every page of that one asks Amplitude for something, whatever the settings say, and the other has a link to it for as
long as it is served.
"""

import os
from pathlib import Path

import prefect
from prefect.cli import app

# A UI whose files are not there is not served.
prefect.__ui_v2_static_path__ = Path(os.devnull, "none")

if __name__ == "__main__":
    app()
