package converter

// A Progress is told how far a conversion is. Calls come from several goroutines.
type Progress interface {
	Progress(Event)
}

// An Event says that one layer went on.
type Event struct {
	Layer, Layers int    // the layer's index from 0, and how many there are
	ID            string // the layer's digest as the manifest has it
	State         State
	Bytes         int64 // bytes of the layer dealt with so far, as the manifest counts them
	Size          int64 // of the layer, in the same bytes
}

// A State is what happens to a layer.
type State int

const (
	LayerWaiting State = iota // its turn has not come; sent for all layers at first
	LayerStarted
	LayerMoved // Bytes has grown
	LayerDone
	LayerPresent // nothing to do: the store, or the target, has it
)

// discard is the Progress of those who gave none.
type discard struct{}

func (discard) Progress(Event) {}
