"""Click logs as numbers: from raw files to ids, transformed numbers and labels in memory-mapped shards.

raw files   --reader-->   Rows   --encode (vocabulary)-->   Batch   --prepare-->   shards   --Split-->   Batch
"""
