"""Reports: from run folders to pictures, the tables behind them, and the commands that made them."""
