"""O-Voxel geometry ops: one file per op, a plain reference beside every fast body."""
