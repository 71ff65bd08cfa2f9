"""The receiver: accepts agents over QUIC, stores what they send once, and acknowledges what is stored.

transport ─bytes▶ intake | legacy ─Batch▶ committer ─▶ store      all pure but for the two ends
    ▲                  ◀────────── Outcome ──────────┘
"""
