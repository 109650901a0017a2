"""Everything a student needs: rows, replayed views, losses, a trainer."""
