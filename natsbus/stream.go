package natsbus

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// keepStreams looks at every stream until ctx is done. It drops the connection
// when one is no longer the one it was, ends earlier than before, or is no
// longer fit for the relay that runs: the relay must compare again.
func (b *Bus) keepStreams(ctx context.Context, l *link) {
	seen := map[string]jetstream.StreamInfo{}
	for ctx.Err() == nil {
		safe := true
		for _, want := range b.streams {
			info, err := look(ctx, l.js, want)
			if ctx.Err() != nil || l.nc.IsClosed() {
				return // says nothing of the stream
			}
			if !errors.Is(err, errUnmade) {
				b.note(want.Name, err)
			}
			if err != nil {
				if l.relaying.Load() {
					return
				}
				safe = false
				continue
			}
			_, adapting := adapt(info.Config, want)
			was, ok := seen[want.Name]
			if adapting != "" && l.relaying.Load() || ok && (!was.Created.Equal(info.Created) || was.State.LastSeq > info.State.LastSeq) {
				return
			}
			seen[want.Name] = *info
		}
		if safe {
			b.answered.Store(int64(time.Since(b.start)))
		}
		sleep(ctx, checkInterval)
	}
}

// errUnmade means that a stream is absent, or not yet what we make of it.
var errUnmade = errors.New("the stream is not made yet")

// unsafeStream says which field of a stream's configuration breaks a promise.
type unsafeStream struct{ field, why string }

func (u unsafeStream) Error() string { return u.field + ": " + u.why }

// look asks for a stream and checks it.
func look(ctx context.Context, js jetstream.JetStream, want jetstream.StreamConfig) (*jetstream.StreamInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	s, err := js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, errUnmade
	}
	if err != nil {
		return nil, err
	}
	info := s.CachedInfo()
	// Another PASSWORD_RESET_TTL is no fault: replicas have two while it is being changed.
	if _, event := adapt(info.Config, want); event == logStreamWidened {
		return info, errUnmade
	}
	return info, checkStream(info.Config)
}

// makeStream makes a stream when it is absent, and widens the first version's
// subjects; it changes nothing else of what an operator set. Only the holder
// of the relay does this, before it publishes: otherwise it could publish into
// a new stream before it knows that the old one is lost.
func (b *Bus) makeStream(ctx context.Context, js jetstream.JetStream, want jetstream.StreamConfig) (*jetstream.StreamInfo, error) {
	info, err := look(ctx, js, want)
	if err != nil && !errors.Is(err, errUnmade) {
		return info, err
	}
	event := logStreamCreated
	if info == nil {
		_, err = js.CreateStream(ctx, want)
	} else {
		var changed jetstream.StreamConfig
		if changed, event = adapt(info.Config, want); event == "" {
			return info, nil
		}
		_, err = js.UpdateStream(ctx, changed)
	}
	var apiErr *jetstream.APIError
	if errors.As(err, &apiErr) && apiErr.ErrorCode == 10065 { // JSStreamSubjectOverlapErr
		err = unsafeStream{"subjects", "another stream has some of " + want.Subjects[0]}
	}
	if err != nil {
		b.note(want.Name, err)
		return nil, err
	}
	b.log.Info(event, "stream", want.Name)
	return look(ctx, js, want)
}

// adapt changes what we change of a stream that is there, if anything, and
// names the log line for it.
func adapt(c, want jetstream.StreamConfig) (jetstream.StreamConfig, string) {
	if slices.Contains(c.Subjects, "auth.events.*") { // the first version's; with it, ours would overlap
		c.Subjects = append(slices.DeleteFunc(slices.Clone(c.Subjects), func(s string) bool { return strings.HasPrefix(s, "auth.events.") }), want.Subjects...)
		return c, logStreamWidened
	}
	if want.Name == secretsStream && c.MaxAge != want.MaxAge { // PASSWORD_RESET_TTL was changed
		c.MaxAge, c.Duplicates = want.MaxAge, min(c.Duplicates, want.MaxAge)
		return c, logStreamMaxAge
	}
	return c, ""
}

// checkStream finds what would make an acknowledgement worthless, or never
// come. Limits and retention are the operator's choice: a stream that is full
// refuses, and rows wait, or drops the oldest, as it was told to.
func checkStream(c jetstream.StreamConfig) error {
	switch {
	case c.Storage != jetstream.FileStorage:
		return unsafeStream{"storage", "not file: a restart of the server loses acknowledged events"}
	case c.PersistMode != jetstream.DefaultPersistMode:
		return unsafeStream{"persist_mode", "asynchronous: a crash of the server loses acknowledged events"}
	case c.NoAck:
		return unsafeStream{"no_ack", "the stream does not acknowledge"}
	case c.Sealed:
		return unsafeStream{"sealed", "the stream takes no messages"}
	case c.SubjectTransform != nil:
		return unsafeStream{"subject_transform", "consumers would not find the subjects of the contract"}
	}
	for eventType, subject := range subjects {
		if streamOf(eventType) == c.Name && !slices.ContainsFunc(c.Subjects, func(pattern string) bool { return covers(pattern, subject) }) {
			return unsafeStream{"subjects", "they do not cover those of the contract"}
		}
	}
	return nil
}

// covers tells whether a subject without wildcards matches a pattern.
func covers(pattern, subject string) bool {
	ps, ss := strings.Split(pattern, "."), strings.Split(subject, ".")
	for i, p := range ps {
		if p == ">" {
			return len(ss) > i
		}
		if i >= len(ss) || p != "*" && p != ss[i] {
			return false
		}
	}
	return len(ps) == len(ss)
}

// note logs what keeps a stream from being used, once for each change.
func (b *Bus) note(stream string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	b.mu.Lock()
	known := b.findings[stream] == text
	b.findings[stream] = text
	b.mu.Unlock()
	var bad unsafeStream
	switch {
	case known || err == nil:
	case errors.As(err, &bad):
		b.log.Error(logStreamUnsafe, "stream", stream, "field", bad.field, "err", bad.why)
	default:
		b.log.Warn(logStreamUnavailable, "stream", stream, "err", text)
	}
}
