{{/*
A StatefulSet: for processes whose name must outlive them. A restarted pod finds its partitions, or the work it held, by
its name at once. Argument: that of `tidegate.pod`, and optionally claims (volumeClaimTemplates), scaled (true if somebody else
says how many there are: an upgrade must not take that back).
*/}}
{{- define "tidegate.statefulSet" -}}
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ include "tidegate.name" . }}
  labels:
    {{- include "tidegate.labels" . | nindent 4 }}
spec:
  serviceName: {{ include "tidegate.fullname" .root }}
  {{- if not .scaled }}
  replicas: {{ .replicas | default .service.replicas | int }}
  {{- end }}
  # The pods do not need each other. An update still replaces one after the other.
  podManagementPolicy: Parallel
  minReadySeconds: {{ ternary .service.minReadySeconds 10 (hasKey .service "minReadySeconds") | int }}
  selector:
    matchLabels:
      {{- include "tidegate.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "tidegate.selector" . | nindent 8 }}
      {{- with .root.Values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "tidegate.pod" (merge (dict "stateful" true) .) | nindent 6 }}
  {{- with .claims }}
  volumeClaimTemplates:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* A Deployment, for processes that need no lasting name. Argument: that of `tidegate.pod`, and optionally strategy. */}}
{{- define "tidegate.deployment" -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "tidegate.name" . }}
  labels:
    {{- include "tidegate.labels" . | nindent 4 }}
spec:
  replicas: {{ .replicas | default .service.replicas | int }}
  minReadySeconds: {{ ternary .service.minReadySeconds 10 (hasKey .service "minReadySeconds") | int }}
  {{- with .strategy }}
  strategy:
    type: {{ . }}
  {{- end }}
  selector:
    matchLabels:
      {{- include "tidegate.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "tidegate.selector" . | nindent 8 }}
      {{- with .root.Values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "tidegate.pod" . | nindent 6 }}
{{- end }}
