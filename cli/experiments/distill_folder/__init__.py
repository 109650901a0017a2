"""kd-cache distill: a folder of images, a teacher and a student, in one command."""
