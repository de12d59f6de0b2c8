"""How fast packed weights are multiplied and text is made, beside other libraries in the same run."""
