"""Pages to read: the frame, the drawings, and text that is safe to show. Every page of megalens is made of these."""
