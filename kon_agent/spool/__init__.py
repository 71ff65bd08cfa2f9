"""The spool: records on disk while nobody can be reached, as a log of small segments. No database: on a full disk an
`unlink` always works.

    frame segment portion limits quota   pure: the format, one file's index, what fits where, what it may take
    disk lock place                      the few operations on files, who uses the folder, where it is
    survey takeover                      a start: what is there, what of it is acknowledged already
    writer reader inventory              the segment written, the segment read, all others and the count of records
    log                                  the spool itself
    inspection                           a look from outside
"""
