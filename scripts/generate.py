"""`culturepark generate` as a script, for a job's working directory. See docs/scaling.md.

ray job submit --working-dir . -- python scripts/generate.py config/cluster.toml --out /shared/run
"""

from __future__ import annotations

import sys
from pathlib import Path

# A job's working directory is no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from culturepark.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "generate")
    main()
