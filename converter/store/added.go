package store

// Added returns the number and bytes of the objects that the transaction has and the
// store had not. It may be called after Commit too.
func (t *Txn) Added() (objects int, bytes int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, o := range t.known {
		if o.staged != 0 {
			objects++
			bytes += o.size
		}
	}
	return objects, bytes
}
