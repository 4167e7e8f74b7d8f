"""What several test files share."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts lie flat in the repository's root
