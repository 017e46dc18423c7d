// Package consumer takes requests from JetStream, calls the API for each one through its
// creator's gate, stores its outcome and acks it.
//
// # The way of a request
//
// request.go is the whole way. The other files are the steps:
//
//	server ──pull──→ receive → take ─┬────────────────────→ admit → perform = attempt → settle ──→ ack
//	                  pull.go        │ delivered before?    │  ↑        call.go     settle.go
//	                                 └→ lookUp = explain ───┘  │          decide.go
//	                                    settle.go explain.go   │             │ try again
//	                                                           │             ↓
//	                                    not now: place ──→ waiting        retryAt
//	                                    place.go           waiting.go        │
//	                                        └──→ parked at the server ←──────┘
//	                                             turns.go: NAK with a delay, fetched back by a second NAK
//
// A delivery is in one stage at a time: arrived, lookingUp, waiting, calling, settling.
// explain, place and decide are pure functions: what the server's answer to a look-up means,
// where a request waits that cannot be called now, and what the API's answer means. Every
// delivery leaves this worker through partition.forget, after one of three ends: it is acked
// because its outcome is stored, it is parked, or it is given back.
//
// A request that waits is in one of two places. Those whose call is near are in the worker, in the
// order of the stream. All others are parked: the message was NAK'd with a delay of at most ten
// minutes, and only a small record of it is kept here. When there is room for it, a
// second NAK on the same reply brings it back at once. Nothing is planned
// ahead, so nothing has to be corrected when limits, holds or latencies change. Creators that
// need what all creators share, a place in the worker or a token of the account's limit,
// stand in a waitQueue (admission.go), each of them once, and get one call each.
//
// # Who owns which goroutine
//
//	Worker.Run       tick, reconcile, lookForOverdue, watchBacklog, spend, and the loops of control.Holds,
//	                 control.Limits, budget.Budget and ownership.Keeper. They end after the
//	                 last call, when Run cancels their context, and Run waits for them.
//	partition.spawn  everything that handles a request outside the lock: look-ups, calls, settling. The worker
//	                 waits for all of them, and a hand-over for those of its partition.
//	puller           one subscription; the NATS client calls receive in its goroutine
//	creator.timer    wakes one creator; stopped when the partition is left or the creator is forgotten
//
// Calls use the context of caller, and what is stored that of settler. Both outlive the context of Run, until
// the grace time and the time for storing are over.
//
// # Locks
//
// A lock is held for decisions and never while the server or the API is waited for. They are taken in
// this order, each of them only after those before it:
//
//	the turn of control's follower   an entry of HOLDS or LIMITS is applied
//	partition.mu                     one partition at a time, never two
//	the mirrors of HOLDS and LIMITS; waitQueue.mu; puller.mu
//	Gate.mu                          one gate at a time
//	what gates share                 holds of the account and of the provider, its breaker, tokens
//
// A waitQueue is popped without the partition's lock, which is taken afterwards: wake must not be called
// under it, so it is spawned there. settler.mu, credits.mu and the locks of troubles and deadlines
// are taken alone. The fields of a delivery belong to the goroutine that works on
// it, except why, which the partition's lock guards, and the stage and the number of attempts, which are atomic.
//
// # What is shared with other workers
//
// Package ownership says which partitions are this worker's. Each call, each reply to the server and each
// delivery asks the partition's lease, which ends by this worker's own clock. What a lease cannot
// stop, a write that is under way, RESULTS decides: a request's place there takes one outcome. See
// publisher.Publisher.Result and Tombstone.
package consumer
