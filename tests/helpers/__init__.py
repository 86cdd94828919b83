"""What the tests of several folders share: runs, models, checkpoints, disks and a Hub."""
