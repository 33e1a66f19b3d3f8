"""`python -m ds_recsys.config`: the reference of the "recsys" block (Markdown); `--schema`: its JSON schema."""

import json
import sys

from ds_recsys.config import recsys_schema, reference_markdown

if "--schema" in sys.argv[1:]:
    print(json.dumps(recsys_schema(), indent=2))
else:
    print(reference_markdown(), end="")
