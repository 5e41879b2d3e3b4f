"""What computes the answers: one seam (`seam.Engine`), two engines. The worker knows only the seam."""
