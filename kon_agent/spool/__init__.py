"""The spool: records on disk while nobody can be reached, as a log of small segments. No database: on a full disk an
`unlink` always works.

`frame` is the format and needs no file, `disk` the few operations on files, `segment` what is known of one file, `log`
the spool itself.
"""
