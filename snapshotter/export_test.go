package snapshotter

// ForceLoop makes a snapshotter mount images from loop devices, as it does by itself
// on kernels that count an EROFS on a file as a stacked filesystem.
func ForceLoop(s *Snapshotter) { s.features.FileStacks.OK = false }
