"""What everything else stands on. Nothing here knows of attention.

errors: the one for input that a user can mend. files: whole or absent, rows, digests, locks. sources: the text behind a
module. device, timing: where and how fast something runs. distributed: processes that train one model.
"""
