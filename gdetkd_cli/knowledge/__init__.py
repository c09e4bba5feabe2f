"""What a frozen teacher says about each image: computed once, stored, and read instead of running the teacher."""
