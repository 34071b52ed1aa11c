"""Made-up Wikipedias of any size, and their dumps in the tree, the formats and the proportions of the published ones.

CirrusSearch content (text is about 15 % of a record's bytes and wikitext 33 %, as data of 2026 have it), the SQL tables
page, page_props, categorylinks, linktarget and langlinks, and Wikidata's wb_items_per_site. The wiki named second has
the SQL dumps and the action lines of 2024, and a bot; the third has the SQL dumps of 2025, the others those of 2026.

Nothing is held in memory but a few hundred pages: whether an item is in a wiki, and its page, title and categories,
are functions of the seed, the item's number and the language, so any process can say them of any page. Neither the
number of processes nor their order changes a byte; another release of zlib or numpy may.
"""

import sys
from pathlib import Path

# The layouts of files and tables are those of the tests' dumps, which own them.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
