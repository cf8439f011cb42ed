"""What is found out before a training: what an earlier run left, from where to go on, whether it can be done."""
